import subprocess
import sys


def test_importing_models_and_training_is_cheap():
    heavy = ["torchvision", "timm", "pyarrow", "PIL", "matplotlib"]
    program = f"import ddfast.training, ddfast.models, sys; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
