"""A training that is stopped and resumed, and one that is not."""

from __future__ import annotations

from torch import Tensor

from toy_training import StopAtSave, exit_state, toy_model, toy_trainer


def whole_and_resumed(folder, stop_at: int, model_options=None, **options) -> list[dict[str, Tensor]]:
    """What each ends with after ten steps: exits, gates, and what the way to train has of its own."""
    ends = []
    for stop in (False, True):
        model, where = toy_model(**model_options or {}), folder / str(stop)
        saving = {"save_strategy": "steps", "save_steps": stop_at, **options}
        run = toy_trainer(model, where, callbacks=[StopAtSave()] if stop else None, **saving)
        run.train()
        if stop:
            assert run.state.global_step == stop_at
            model = toy_model(**model_options or {})
            run = toy_trainer(model, where, **saving)
            run.train(resume_from_checkpoint=str(where / f"checkpoint-{stop_at}"))
        assert run.state.global_step == 10
        ends.append(exit_state(model) | {f"method.{k}": v.clone() for k, v in run.im_training.state_dict().items()})
    return ends
