"""How a server is started: on which GPUs, in which environment."""

from lmrl.engines.vllm_server.process import LAUNCHER_VARIABLES, gpus_of, serve_environment


def test_servers_get_gpus_of_their_own_where_there_are_enough():
    assert [gpus_of(index, 2, 2, list("01234"), 1) for index in range(2)] == [("1", "2"), ("3", "4")]
    assert [gpus_of(index, 2, 1, ["0"], 1) for index in range(2)] == [("0",), ("0",)]
    assert gpus_of(0, 1, 1, [], 1) == ()


def test_a_server_is_not_a_rank_of_the_run():
    environment = serve_environment(dict.fromkeys([*LAUNCHER_VARIABLES, "PATH"], "1"), ("2", "3"))
    assert "PATH" in environment and not set(LAUNCHER_VARIABLES) & environment.keys()
    assert (environment["VLLM_SERVER_DEV_MODE"], environment["CUDA_VISIBLE_DEVICES"]) == ("1", "2,3")
