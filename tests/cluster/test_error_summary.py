"""The one sentence to which a long error is reduced."""

from __future__ import annotations

from ray.exceptions import ActorDiedError

from tbpo_ray.cluster.error_summary import error_summary


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
