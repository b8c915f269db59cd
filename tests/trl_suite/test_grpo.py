"""
What works with TRL's GRPOTrainer works with DPGTrainer in its place.

Every case is run with both, from the same arguments and with the same assertions. `make trl-suite` runs all cases,
`make test` some of each kind.
"""

from unittest.mock import patch

import pytest
from trl import GRPOTrainer

from tests.trl_suite.cases import CASES
from tests.trl_suite.runs import changed, make_trainer, parameters, prompts, scripted
from trl_dpg import DPGTrainer


ALWAYS = ["defaults-conversational", "beta", "peft-config", "evaluation", "reward-weights", "tools"]
TRAINERS = pytest.mark.parametrize("trainer_class", [GRPOTrainer, DPGTrainer])


def case_params():
    for name in CASES:
        yield pytest.param(name, marks=() if name in ALWAYS else pytest.mark.trl_suite)


@TRAINERS
@pytest.mark.parametrize("name", case_params())
def test_trains(trainer_class, name, models, tmp_path):
    case = CASES[name]
    given = dict(model=models(case.model), train_dataset=prompts(case.conversational))
    given |= case.given(models) if case.given is not None else {}
    trainer = make_trainer(trainer_class, models, tmp_path, case.args, **given)
    trainable, frozen = parameters(trainer.model)
    assert trainable
    if case.replies:
        with patch.object(trainer.model, "generate", side_effect=scripted(trainer, case.replies)):
            trainer.train()
    else:
        trainer.train()

    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert logs and "train_loss" in trainer.state.log_history[-1]
    for key in case.logged:
        assert all(key in log for log in logs), key
    if trainer_class is DPGTrainer:
        assert all("rewards/dpg/mean" in log and "dpg/metric_after" in log for log in logs)
    learnt = {name for name in trainable if "vision" not in name and "multi_modal" not in name}
    assert (changed(trainer.model, trainable) >= learnt) if case.learns else not changed(trainer.model, trainable)
    assert not changed(trainer.model, frozen)
    if case.check is not None:
        case.check(trainer)
