"""Networks that methods of the league need, as small as they come; and what every page of a study says."""

import re

import pytest

from bench import facts
from ddfast.training import train_experts, train_proxies
from tests.methods.diffusion.conftest import estimator, prior

__all__ = ["estimator", "prior"]


@pytest.fixture(scope="session")
def tiny_proxies(tmp_path_factory, toy_folder):
    out = tmp_path_factory.mktemp("league") / "proxies"
    settings = {"arch": "convnet3_in", "images_per_class": 8, "image_size": 16, "quiet": True}
    return train_proxies(toy_folder, count=1, epochs=1, out=out, **settings).folder


@pytest.fixture(scope="session")
def tiny_experts(tmp_path_factory, toy_folder):
    out = tmp_path_factory.mktemp("league") / "experts"
    settings = {"images_per_class": 8, "image_size": 16, "lr": 0.02, "quiet": True}
    return train_experts(toy_folder, count=1, epochs=2, out=out, **settings).folder


BUDGETS = {
    "infoutil": "n_samples=4 crops=2",
    "rded": "crops=2",
    "forgetting": "epochs=2",
    "dm": "iterations=1 real_batch=8",
    "dc": "iterations=1 outer_loop=1 inner_loop=1 real_batch=8",
    "dsa": "iterations=1 outer_loop=1 inner_loop=1 real_batch=8",
    "idc": "iterations=1 inner_loop=1 net_samples=8 net_batch=8 real_batch=8",
    "udd": "iterations=1 inner_loop=1 net_samples=8 net_batch=8 real_batch=8 chooser_steps=1",
    "idm": "iterations=1 real_batch=8 net_steps=1 net_batch=8",
    "mtt": "iterations=1 syn_steps=1 expert_epochs=1 max_start_epoch=1 lr_img=1",
    "sre2l": "iterations=1 batch=6",
    "igds": "steps=2",
}


@pytest.fixture
def league_words(toy_folder, toy_teacher, tiny_proxies, tiny_experts, prior, estimator, tmp_path):
    """Options of a study of any methods, at budgets that measure nothing."""
    given = {
        "data": toy_folder,
        "teacher": toy_teacher,
        "proxies": tiny_proxies,
        "experts": tiny_experts,
        "prior": prior,
        "estimator": estimator,
        "work": tmp_path / "work",
        "images-per-class": 12,
    }
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return words + [word for name, text in BUDGETS.items() for word in ("--budget", f"{name}:{text}")]


BUDGET = re.compile(
    r"\d[\d,]* (?:epochs|steps|iterations|runs|seeds|images a class)|a set takes|seconds of a set|at IPC \d|"
    r"Budget: the paper's"
)


def lacks(page):
    """What a page does not say of how it was made."""
    wanted = {
        "command": "Made by `python -m bench",
        "commit": f"written at commit {facts.commit()[0]}",
        "options": " --",
    }
    missing = [what for what, text in wanted.items() if text not in page]
    return [*missing, *([] if BUDGET.search(page) else ["budget"])]


@pytest.fixture(autouse=True)
def every_page_says_how_it_was_made(tmp_path):
    """After each test: the pages that a study has written into its folder."""
    yield
    for path in tmp_path.glob("*.md"):
        assert lacks(path.read_text("utf-8")) == [], path
