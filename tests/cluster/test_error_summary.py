"""The one sentence that is told of a long error."""

from __future__ import annotations

from ray.exceptions import ActorDiedError

from tbpo_ray.cluster.error_summary import error_summary


def test_of_an_actor_that_died_the_reason_is_told_and_not_its_number():
    told = "The actor died unexpectedly before finishing this task."
    error = ActorDiedError()
    assert str(error).startswith("The actor died")
    assert error_summary(error) == str(error).splitlines()[0]
    listed = RuntimeError(f"{told}\n\tclass_name: \n\tactor_id: 5ac2\n\tpid: 4\n\tip: 10.0.0.1")
    assert error_summary(listed) == told


def test_the_innermost_named_error_comes_before_its_wrappers():
    text = "ray.exceptions.RayTaskError(ValueError): ray::f()\n  File x\nValueError: no such key\n  pid: 3\n"
    assert error_summary(RuntimeError(text)) == "ValueError: no such key"
