"""What is not supported is refused at construction, with the setups that are."""

from types import SimpleNamespace

import pytest
import torch

from hf_adaclip import UnsupportedSetupError
from hf_adaclip.support import SETUPS, check_accelerator, check_device, check_device_map, check_optimizer_name


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


def test_fsdp1_is_refused_with_the_way_to_fsdp2():
    old = SimpleNamespace(distributed_type="FSDP", parallelism_config=None, is_fsdp2=False)
    with pytest.raises(UnsupportedSetupError, match=r"is FSDP1 instead.*set `fsdp_version: 2`"):
        check_accelerator(old)


def test_a_device_without_float64_is_refused():
    with pytest.raises(UnsupportedSetupError, match="`device` must have float64, but mps has none"):
        check_device(torch.device("mps"))
    check_device(torch.device("cuda", 1))


def test_a_model_on_one_device_passes_and_one_on_several_does_not():
    check_device_map(SimpleNamespace())
    check_device_map(SimpleNamespace(hf_device_map={"": 0}))
    check_device_map(SimpleNamespace(hf_device_map={"a": "cuda:0", "b": "cuda:0"}))
    with pytest.raises(UnsupportedSetupError, match="is DEVICE_MAP instead"):
        check_device_map(SimpleNamespace(hf_device_map={"a": 0, "b": "cpu"}))


@pytest.mark.parametrize("name", ["lomo", "galore_adamw_8bit_layerwise"])
def test_optimizers_that_step_within_the_backward_pass_are_refused(name):
    with pytest.raises(UnsupportedSetupError, match="it steps within"):
        check_optimizer_name(name)
    check_optimizer_name("galore_adamw")
