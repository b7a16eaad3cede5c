"""The Dockerfiles install what README.md says, and build where docker or podman works."""

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = ("Dockerfile", "Dockerfile.cuda")


@pytest.fixture(scope="module")
def settings():
    found = configparser.ConfigParser()
    found.read(ROOT / "setup.cfg")
    return found


def lines(name):
    """Instructions, without comments and with continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / name).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip()]


def installs(name):
    """What each `pip install` is given, options without a meaning for the result left out."""
    given = [line.split("pip install", 1)[1] for line in lines(name) if "pip install" in line]
    return [re.sub(r"--no-cache-dir|\"|\$\{EXTRAS\}", "", one).split() for one in given]


def test_they_install_as_the_readme_does():
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"<!-- install -->\n```bash\n(.*?)```", readme, re.DOTALL)[1]
    options, place = re.search(r"pip install (-e) (\S+)", block).groups()
    assert place == "."  # the clone, which a Dockerfile copies to /opt/lmrl
    assert "COPY . /opt/lmrl" in lines("Dockerfile") and "COPY . /opt/lmrl" in lines("Dockerfile.cuda")
    assert installs("Dockerfile.cuda") == [[options, "/opt/lmrl"]]
    torch, own = installs("Dockerfile")
    assert own == [options, "/opt/lmrl"]
    # README: for the CPU build, install torch first from the CPU package index that pytorch.org names
    assert "install torch first from the CPU" in " ".join(readme.split())
    assert torch == ["torch", "--index-url", "https://download.pytorch.org/whl/cpu"]


def test_python_is_new_enough(settings):
    least = tuple(map(int, re.search(r">=(\d+)\.(\d+)", settings["options"]["python_requires"]).groups()))
    version = re.search(r"^FROM python:(\d+)\.(\d+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert tuple(map(int, version.groups())) >= least
    # Ubuntu 24.04 has Python 3.12.
    assert "ubuntu24.04" in lines("Dockerfile.cuda")[0] and (3, 12) >= least


@pytest.mark.parametrize("name", FILES)
def test_what_they_start_and_name_is_there(name, settings):
    assert 'ENTRYPOINT ["lmrl"]' in lines(name)
    assert re.search(r"^lmrl = ", settings["options.entry_points"]["console_scripts"].strip())
    extras = re.findall(r"EXTRAS=\[([\w,-]+)\]", (ROOT / name).read_text())
    assert extras and set(",".join(extras).split(",")) <= set(settings["options.extras_require"])


def builder():
    """A program that can build images here, None without one (or without its daemon)."""
    for program in ("docker", "podman"):
        if shutil.which(program) and subprocess.run([program, "info"], capture_output=True, timeout=60).returncode == 0:
            return program
    return None


def test_the_cpu_image_builds_and_runs():
    program = builder()
    if program is None:
        pytest.skip("neither docker nor podman works here")
    tag = "lmrl-test"
    built = subprocess.run([program, "build", "-t", tag, str(ROOT)], capture_output=True, text=True, timeout=3600)
    assert built.returncode == 0, built.stderr[-2000:]
    shown = subprocess.run([program, "run", "--rm", tag, "ls", "recipes"], capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0 and "random_walks/ppo" in shown.stdout, shown.stderr[-2000:]
