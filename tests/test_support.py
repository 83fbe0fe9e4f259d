"""What is not supported is refused at construction, with the setups that are."""

from types import SimpleNamespace

import pytest

from hf_adaclip import UnsupportedSetupError
from hf_adaclip.support import SETUPS, check_accelerator


def accelerator(kind, **parallelism):
    return SimpleNamespace(
        distributed_type=kind, parallelism_config=SimpleNamespace(**parallelism) if parallelism else None
    )


@pytest.mark.parametrize("kind", [k for k, v in SETUPS.items() if v.how])
def test_supported_setups_say_how(kind):
    assert check_accelerator(accelerator(kind, tp_enabled=False)) == SETUPS[kind].how


@pytest.mark.parametrize("kind", [k for k, v in SETUPS.items() if not v.how])
def test_others_are_refused_with_a_reason(kind):
    with pytest.raises(
        UnsupportedSetupError,
        match=f"must be one of DEEPSPEED, FSDP, MULTI_CPU, MULTI_GPU, NO, but is {kind} instead: ",
    ):
        check_accelerator(accelerator(kind))


@pytest.mark.parametrize("parallel", ["tp", "cp", "sp"])
def test_parallelism_within_a_layer_or_sequence_is_refused_though_it_calls_itself_multi_gpu(parallel):
    with pytest.raises(UnsupportedSetupError, match="is TP instead"):
        check_accelerator(accelerator("MULTI_GPU", **{f"{parallel}_enabled": True}))
