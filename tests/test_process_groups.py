"""What a process is among others, asked of one alone."""

import pytest
import torch
import torch.distributed as dist
from tiny import CONFIG

from igpt_fast import processes
from igpt_fast.errors import InputError
from igpt_fast.options import Options
from igpt_fast.processes import Processes
from igpt_fast.run import refuse_unequal_shares


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"seed": 0, "groups": "a"}, None),
        ({"seed": 1, "groups": "a"}, "another seed than process 0, 1 for 0"),
        ({"seed": 0}, "another groups than process 0, None for a"),
        ({"seed": 0, "groups": "a", "more": 7}, "another more than process 0, 7 for None"),
    ],
)
def test_differences_either_way_are_refused(monkeypatch, theirs, message):
    ours = {"seed": 0, "groups": "a"}

    def gather(found, given, group):
        assert given == ours
        found[:] = [ours, theirs]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    some = Processes(torch.device("cpu"))
    some.count = 2
    if message is None:
        some.refuse_differences(ours)
    else:
        with pytest.raises(InputError, match=f"process 1 has {message}: all must be given the same command"):
            some.refuse_differences(ours)


def test_a_step_is_shared_evenly_or_refused():
    refuse_unequal_shares(Options(batch=12, accumulate=2), processes=3)
    with pytest.raises(InputError, match="--batch 8 cannot be split evenly among 3 processes: use a multiple of 3"):
        refuse_unequal_shares(Options(batch=8), processes=3)
    with pytest.raises(InputError, match="among 3 processes, 4 parts each: use a multiple of 12"):
        refuse_unequal_shares(Options(batch=8, accumulate=4), processes=3)


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert processes._own("auto") == "auto" and processes._own("cpu") == "cpu" and not chosen
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in ("auto", "cuda", torch.device("cuda")):
        assert processes._own(device) == torch.device("cuda", 1) and chosen.pop() == 1
    with pytest.raises(InputError, match="--device cuda:0 is one GPU"):
        processes._own(torch.device("cuda:0"))
    assert processes._own("cuda:0", chosen=True) == torch.device("cuda", 0) == chosen.pop(), "they know which is whose"
    assert processes._own("cuda", chosen=True) == torch.device("cuda", 1) and chosen.pop() == 1
    with monkeypatch.context() as elsewhere:
        elsewhere.delenv("LOCAL_RANK")
        elsewhere.setattr(torch.cuda, "current_device", lambda: 0)
        assert processes._own("auto", chosen=True) == torch.device("cuda", 0) == chosen.pop()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert processes._own("cuda") == "cuda" and not chosen, "pick_device has the words for that"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="there are 2; use --nproc-per-node 2"):
        processes._own(torch.device("cuda"))


@pytest.mark.parametrize(("device", "failed"), [("cpu", True), ("cpu", False), ("cuda", True), ("cuda", False)])
def test_a_process_that_fails_waits_for_no_other_to_end_nccls_group(monkeypatch, device, failed):
    said = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda: said.append("destroy"))
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: said.append("abort"))
    processes._leave(torch.device(device), failed)
    assert said == ["abort" if device == "cuda" and failed else "destroy"]
    monkeypatch.delattr(dist.distributed_c10d, "_abort_process_group")  # before torch 2.6
    processes._leave(torch.device("cuda"), True)
    assert len(said) == 1


def test_what_nccl_says_is_passed_on():
    text = (
        "NCCL error in: NCCLUtils.hpp:94, invalid usage\nncclInvalidUsage: as a rule that.\nLast error:\nDuplicate GPU"
    )
    said = processes._of_others(dist.DistBackendError(text))
    assert said.startswith(
        "NCCL failed (NCCL error in: NCCLUtils.hpp:94, invalid usage: Last error: Duplicate GPU), or"
    )
    assert processes._of_others(RuntimeError("gloo: closed")).startswith("another of the processes has ended")


def test_several_processes_without_torchrun_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match="RANK is not set: start them by torchrun"), processes.together("cpu"):
        raise AssertionError("never comes here")


def test_one_process_alone_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with processes.together(torch.device("cpu")) as alone, alone.first_goes_ahead():
        assert (alone.rank, alone.count, alone.first, str(alone)) == (0, 1, True, "cpu")
        assert alone.largest(7) == 7 and alone.share(torch.arange(3)).tolist() == [0, 1, 2]
        assert not torch.distributed.is_initialized() and CONFIG.tokens == 24
