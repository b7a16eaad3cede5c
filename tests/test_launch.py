"""What accelerate's configuration files become, without starting a process.

lmrl.launch calls functions of accelerate that are no public interface; these tests fail where a new version changes them.
"""

import pytest

from lmrl.errors import RecipeError
from lmrl.launch import accelerate_environment
from lmrl.recipe.files import find_launch


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fsdp2", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
        ("zero2", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
        ("zero3", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}),
    ],
)
def test_shipped_files_become_the_environment(name, expected):
    environment, processes = accelerate_environment(3, find_launch(name))
    assert processes == 3
    assert {key: environment.get(key) for key in expected} == expected


def test_ddp_takes_the_number_of_its_file(tmp_path):
    (tmp_path / "two.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n")
    environment, processes = accelerate_environment(None, tmp_path / "two.yaml")
    assert processes == 2 and "ACCELERATE_USE_DEEPSPEED" not in environment
    assert accelerate_environment(None, None)[1] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("distributed_type: [", "--accelerate: .*bad.yaml"),
        ("no_such_key: 3", "--accelerate: .*bad.yaml: .*distributed_type"),
        (
            "distributed_type: MULTI_CPU\nnum_machines: 2\nnum_processes: 4\n",
            "for several machines use accelerate launch",
        ),
    ],
)
def test_an_invalid_file_is_one_line(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message) as error:
        accelerate_environment(2, tmp_path / "bad.yaml")
    assert "\n" not in str(error.value)
