"""What vlm_reason.compat.deepspeed relies on in DeepSpeed. A release that changes one of these facts fails here.

That the facts together train rightly is tested in tests/integration/test_sharded.py, in two processes.
"""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

pytest.importorskip("deepspeed")

from deepspeed import DeepSpeedEngine, zero
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from deepspeed.utils.tensor_fragment import fragment_address, tensor_fragment

from vlm_reason.compat.deepspeed import own_the_boundary


def names(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_the_caller_can_own_the_accumulation_boundary():
    config = {"train_batch_size": 1}
    own_the_boundary(config)
    assert DeepSpeedConfig(config).managed_gradient_accumulation is False
    assert DeepSpeedConfig({"train_batch_size": 1}).managed_gradient_accumulation is True
    assert "def backward(self, loss, retain_graph=False, scale_wrt_gas=True)" in inspect.getsource(
        DeepSpeedEngine
    )


def test_parameters_are_gathered_and_given_back():
    assert {"params", "modifier_rank"} <= set(names(zero.GatheredParameters.__init__))


def test_whole_and_local_state_functions_take_these_arguments():
    assert names(safe_get_full_fp32_param) == ["param"]
    assert names(safe_get_full_optimizer_state) == ["param", "optim_state_key"]
    assert names(safe_set_local_fp32_param) == ["param", "value"]
    assert names(safe_set_local_optimizer_state) == ["param", "value", "optim_state_key"]


@pytest.mark.parametrize(
    ("optimizer", "attributes"),
    [
        (DeepSpeedZeroOptimizer, ("single_partition_of_fp32_groups",)),
        (
            DeepSpeedZeroOptimizer_Stage3,
            ("fp32_partitioned_groups_flat", "sub_group_to_group_id", "grad_partitions_flat_buffer"),
        ),
    ],
)
def test_flat_partitions_have_these_names(optimizer, attributes):
    source = inspect.getsource(optimizer)
    for name in attributes:
        assert f"self.{name}" in source, f"{optimizer.__name__} no longer keeps {name}"


def test_the_step_hands_one_group_at_a_time_to_the_optimiser_with_its_settings():
    """The key `adapter` of a parameter group must reach the hook that hides the groups of a resting adapter."""
    low, high = (
        inspect.getsource(DeepSpeedZeroOptimizer._optimizer_step),
        inspect.getsource(DeepSpeedZeroOptimizer_Stage3._optimizer_step),
    )
    assert "self.optimizer.param_groups = [original_param_groups[group_no]]" in low
    assert "self.optimizer.param_groups[param_group_id]['params'] = [fp32_param]" in high


def test_zero3_answers_only_for_parameters_that_require_grad():
    assert "if not param.requires_grad:" in inspect.getsource(DeepSpeedZeroOptimizer_Stage3.get_full_hp_param)


def test_a_fragment_says_where_it_lies():
    assert {"numel", "start"} == set(fragment_address.__dataclass_fields__)
    assert {"hp_fragment", "hp_fragment_address", "lp_fragment_address"} <= set(
        tensor_fragment.__dataclass_fields__
    )


def test_nothing_of_it_reaches_standard_output():
    """A process of its own: the logger is made when DeepSpeed is imported, and pytest has imported it."""
    code = """
from vlm_reason.compat.deepspeed_log import keep_stdout_clean
keep_stdout_clean()
import deepspeed
deepspeed.get_accelerator()
from deepspeed.utils import logger
logger.warning("something else")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=200
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert "deepspeed: something else" in done.stderr and "Setting accelerator" not in done.stderr
