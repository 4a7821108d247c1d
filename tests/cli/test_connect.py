"""How a process meets the others, why it could not, and when it may leave."""

import contextlib
import datetime
import threading

import pytest
import torch.distributed as dist
from accelerate import utils

from mochi_tune.cli.connect import announced_end, avoid_unsupported_links, cause, describe_failure, leave

# As torch writes it.
NCCL = """NCCL error in: /torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled system error, NCCL version 2.27.5
ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.
Last error:
socketStartConnect: Connect to 10.0.0.1<4567> failed : Software caused connection abort"""
GLOO = "[../third_party/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:946. It may have ended."


def test_the_cause_is_what_the_library_names_last():
    assert cause(NCCL) == "socketStartConnect: Connect to 10.0.0.1<4567> failed : Software caused connection abort"
    assert cause(GLOO) == "Connection closed by peer [127.0.0.1]:946"


def test_gpus_that_cannot_connect_are_told_from_processes_that_do_not_meet():
    assert f"could not connect its GPU with the others ({cause(NCCL)}): set NCCL_SOCKET" in describe_failure(NCCL, {})
    met = {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert describe_failure("in use\nmore", met).startswith(
        "could not meet the others at a:1 (in use): set MASTER_PORT"
    )


@pytest.mark.parametrize(("is_supported", "expected"), [(True, [None, "0"]), (False, ["1", "0"])])
def test_nccl_avoids_links_that_gpus_cannot_use_unless_the_user_has_chosen(monkeypatch, is_supported, expected):
    monkeypatch.setattr(utils, "check_cuda_p2p_ib_support", lambda: is_supported)
    environment = {"NCCL_IB_DISABLE": "0"}
    avoid_unsupported_links(environment)
    assert [environment.get(name) for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE")] == expected


@pytest.mark.parametrize("other", ["finishes", "fails", "is killed"])
def test_rank_0_leaves_after_the_others_and_does_not_wait_for_one_that_failed(monkeypatch, other):
    store, global_rank = dist.HashStore(), threading.local()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: global_rank.value)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)

    def end(own: int, seconds: float, error: type[Exception] | None = None) -> None:
        global_rank.value = own
        with announced_end():
            if error is not None:
                raise error
        leave(datetime.timedelta(seconds=seconds))

    first = threading.Thread(target=end, args=(0, 0.2 if other == "is killed" else 60.0))
    first.start()
    if other != "is killed":
        first.join(0.3)
        assert first.is_alive()
        with contextlib.suppress(ZeroDivisionError):
            end(1, 60.0, ZeroDivisionError if other == "fails" else None)
    first.join(30)
    assert not first.is_alive()
