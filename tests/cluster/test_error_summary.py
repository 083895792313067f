"""The one sentence to which a long error is reduced."""

from __future__ import annotations

from ray.exceptions import ActorDiedError

from tbpo_ray.cluster.error_summary import error_summary, last_error


def test_the_summary_of_a_dead_actor_is_the_reason_and_not_its_id():
    reason = "The actor died unexpectedly before finishing this task."
    error = ActorDiedError()
    assert str(error).startswith("The actor died")
    assert error_summary(error) == str(error).splitlines()[0]
    listed = RuntimeError(f"{reason}\n\tclass_name: \n\tactor_id: 5ac2\n\tpid: 4\n\tip: 10.0.0.1")
    assert error_summary(listed) == reason


def test_the_innermost_named_error_comes_before_its_wrappers():
    text = "ray.exceptions.RayTaskError(ValueError): ray::f()\n  File x\nValueError: no such key\n  pid: 3\n"
    assert error_summary(RuntimeError(text)) == "ValueError: no such key"


def test_the_last_error_of_a_log_is_the_cause_and_has_no_logger_prefix():
    prefix = "(EngineCore_DP0 pid=31) ERROR 11-26 18:40:12 [core.py:800]"
    log = f"""
{prefix} Traceback (most recent call last):
{prefix}   File "model.py", line 1, in forward
{prefix} ValueError: Head size 8 is not supported
INFO 11-26 18:40:12 [core.py:801] shutting down
RuntimeError: Engine core initialization failed. See root cause above.
vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.
"""
    assert last_error(log) == "ValueError: Head size 8 is not supported"
    assert last_error("line\nFatal Python error: Segmentation fault\n\nThread 1\n") == (
        "Fatal Python error: Segmentation fault"
    )
    assert last_error("all is well\n") is None
