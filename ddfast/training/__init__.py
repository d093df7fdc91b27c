"""Training of teachers, and evaluation of distilled sets by the students trained on them."""

from ddfast.training.distilled_images import DistilledImages
from ddfast.training.estimator import EstimatorConfig, train_estimator
from ddfast.training.evaluation import EvaluationResult, evaluate
from ddfast.training.experts import Experts, experts_identity, load_experts, train_experts
from ddfast.training.image_sets import ImageSet, read_test_set, read_training_set
from ddfast.training.prior import PriorConfig, train_prior
from ddfast.training.protocol import PROTOCOLS, Protocol
from ddfast.training.proxies import Proxies, load_proxies, proxies_identity, train_proxies
from ddfast.training.student import StudentResult, train_student
from ddfast.training.teacher import fit_teacher, train_teacher
from ddfast.training.teacher_config import TeacherConfig

__all__ = [
    "PROTOCOLS",
    "DistilledImages",
    "EstimatorConfig",
    "EvaluationResult",
    "Experts",
    "ImageSet",
    "PriorConfig",
    "Protocol",
    "Proxies",
    "StudentResult",
    "TeacherConfig",
    "evaluate",
    "experts_identity",
    "fit_teacher",
    "load_experts",
    "load_proxies",
    "proxies_identity",
    "read_test_set",
    "read_training_set",
    "train_estimator",
    "train_experts",
    "train_prior",
    "train_proxies",
    "train_student",
    "train_teacher",
]
