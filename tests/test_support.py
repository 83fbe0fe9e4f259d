"""What is not supported is refused at construction, with the setups that are."""

from types import SimpleNamespace

import pytest
import torch

from hf_adaclip import AdaptiveClipper, UnsupportedSetupError
from hf_adaclip.gradients.sharding import sum_over_ranks_
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


@pytest.mark.parametrize("offload", [True, "policy"])
def test_fsdp2_with_cpu_offload_is_refused_when_the_clipper_is_made(offload):
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

    def made(policy):
        state = SimpleNamespace(fsdp_plugin=SimpleNamespace(cpu_offload=policy))
        return SimpleNamespace(distributed_type="FSDP", parallelism_config=None, is_fsdp2=True, state=state)

    with pytest.raises(UnsupportedSetupError, match=r"is FSDP_CPU_OFFLOAD instead: .*unset `fsdp_offload_params`"):
        AdaptiveClipper(accelerator=made(CPUOffloadPolicy() if offload == "policy" else offload))
    for without in (OffloadPolicy(), False, None):
        assert check_accelerator(made(without)) == SETUPS["FSDP"].how


def test_accelerates_own_plugin_is_understood():
    accelerate = pytest.importorskip("accelerate")
    for offload, kind in ((True, "FSDP_CPU_OFFLOAD"), (False, None)):
        plugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2, cpu_offload=offload)
        state = SimpleNamespace(fsdp_plugin=plugin)
        of = SimpleNamespace(distributed_type="FSDP", parallelism_config=None, is_fsdp2=True, state=state)
        if kind is None:
            check_accelerator(of)
        else:
            with pytest.raises(UnsupportedSetupError, match=f"is {kind} instead"):
                check_accelerator(of)


def test_shards_in_host_memory_of_a_mesh_of_accelerators_are_refused():
    """`fully_shard` with `CPUOffloadPolicy` in a plain loop: no accelerator says so, the tensors do."""
    layout = (SimpleNamespace(device_type="cuda"), (0,))
    with pytest.raises(UnsupportedSetupError, match=r"their gradients on cuda, .* but they are on cpu instead"):
        sum_over_ranks_(torch.ones(3), layout)


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
