"""Captum's own tests of its Shapley explainers, run against ours in their place.

    python -m bench captum_suite --captum-source CHECKOUT [--out bench/results/captum_suite.md]

CHECKOUT is a copy of Captum's sources that holds tests/attr/test_kernel_shap.py and test_shapley.py; the Captum that
is installed is the one under test. The two files run three times: as they are; with the three classes imported from
`ddfast.captum`; and with Captum's own classes under `ddfast.accelerate("captum")`. Prints a line a run and exits with 1
where a test fails, is skipped or is lost. Nothing of Captum's is written but to a temporary folder.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

TESTS = ("test_kernel_shap.py", "test_shapley.py")
EXPLAINERS = ("KernelShap", "ShapleyValueSampling", "ShapleyValues")
WAYS = {
    "captum": "Captum itself",
    "import": "classes imported from ddfast.captum",
    "accelerate": 'ddfast.accelerate("captum")',
}

# Counts which calls of `attribute` ours answered and which were handed to Captum's own method.
CONFTEST = """
import atexit
from ddfast.captum import explainers as ours

asked, handed = [], []

def counted(function, calls):
    def count(*args, **kwargs):
        calls.append(function.__name__)
        return function(*args, **kwargs)
    return count

for explainer, attribute in list(ours._CAPTUM_ATTRIBUTE.items()):
    ours._CAPTUM_ATTRIBUTE[explainer] = counted(attribute, handed)
for name in ("_kernel_shap", "_shapley_values"):
    setattr(ours, name, counted(getattr(ours, name), asked))
atexit.register(lambda: print(f"\\nours={len(asked) - len(handed)} handed={len(handed)}"))
"""
ACCELERATED = "\nimport ddfast\nddfast.accelerate('captum')\n"


def run(source: Path, way: str) -> tuple[dict[str, int], str]:
    """Counts of the two files' tests, and of the calls that ours answered (empty for Captum itself)."""
    with tempfile.TemporaryDirectory() as folder:
        for name in TESTS:
            text = (source / "tests" / "attr" / name).read_text()
            if way == "import":
                text = with_our_classes(text)
            Path(folder, name).write_text(text)
        conftest = {"captum": "", "import": CONFTEST, "accelerate": CONFTEST + ACCELERATED}[way]
        Path(folder, "conftest.py").write_text(conftest)
        Path(folder, "pytest.ini").write_text("[pytest]\n")
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        done = subprocess.run([*command, *TESTS], cwd=folder, capture_output=True, text=True, check=False)
        if not report.exists():
            raise SystemExit(done.stdout + done.stderr)
        suite = ElementTree.parse(report).getroot()[0]
        counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
        if counts["failures"] or counts["errors"]:
            print(done.stdout, file=sys.stderr)
    served = re.search(r"ours=(\d+) handed=(\d+)", done.stdout)
    return counts, "" if served is None else f"{served[1]} calls answered, {served[2]} handed to Captum"


def with_our_classes(text: str) -> str:
    """A test file with the explainers imported from `ddfast.captum`."""
    names = "|".join(sorted(EXPLAINERS, key=len, reverse=True))
    pattern = rf"^from captum\.attr\._core\.\w+ import ((?:{names})(?:, (?:{names}))*)$"
    replaced, count = re.subn(pattern, r"from ddfast.captum import \1", text, flags=re.MULTILINE)
    if count != 1:
        raise SystemExit(f"the import of the explainers was found {count} times, wanted once")
    return replaced


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench.trials.captum_suite", description=__doc__.splitlines()[0])
    parser.add_argument("--captum-source", type=Path, required=True, help="checkout of Captum's sources")
    parser.add_argument("--out", type=Path, help="Markdown file to write the result to")
    args = parser.parse_args(argv)
    missing = [name for name in TESTS if not (args.captum_source / "tests" / "attr" / name).is_file()]
    if missing:
        parser.error(f"{args.captum_source} holds no tests/attr/{missing[0]}")
    packages = ("captum", "ddfast", "torch", "scikit-learn")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    lines = [f"- Python {sys.version.split()[0]}, {versions}"]
    for name in TESTS:
        digest = hashlib.sha256((args.captum_source / "tests" / "attr" / name).read_bytes()).hexdigest()
        lines.append(f"- {name}: SHA-256 {digest[:16]}")
    lines.append("")
    lines += ["| run | tests | passed | failed | skipped | calls of `attribute` |", "| --- " * 6 + "|"]
    fine, expected = True, None
    for way, what in WAYS.items():
        counts, served = run(args.captum_source, way)
        failed = counts["failures"] + counts["errors"]
        passed = counts["tests"] - failed - counts["skipped"]
        expected = counts["tests"] if expected is None else expected
        fine = fine and passed == expected > 0
        cells = (what, counts["tests"], passed, failed, counts["skipped"], served)
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if args.out is not None:
        heading = (
            "Output of `python -m bench captum_suite`: test_kernel_shap.py and test_shapley.py of Captum\n\n"
        )
        args.out.write_text(heading + text)
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
