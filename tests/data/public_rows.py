"""One row in the shape of each public preference set, and rows that tie."""

import json
from typing import Any

U, A, S = (
    lambda text, role=role: {"role": role, "content": text} for role in ("user", "assistant", "system")
)


Q, GOOD, BAD = "Which sea is salty?", "All of them.", "None."


PUBLIC: dict[str, tuple[str, dict[str, Any]]] = {
    "orca": ("pairs", {"system": "Be brief.", "question": Q, "chosen": GOOD, "rejected": BAD}),
    "distilabel orca": (
        "pairs",
        {"system": "Be brief.", "input": Q, "chosen": GOOD, "rejected": BAD, "status": "unchanged"},
    ),
    "truthy": ("pairs", {"id": 1, "system": "Be brief.", "prompt": Q, "chosen": GOOD, "rejected": BAD}),
    "orpo mix": (
        "pairs",
        {"question": Q, "prompt": Q, "chosen": [U(Q), A(GOOD)], "rejected": [U(Q), A(BAD)]},
    ),
    "ratings": (
        "pairs",
        {
            "prompt": Q,
            "chosen": [U(Q), A(GOOD)],
            "chosen-rating": 5.0,
            "rejected": [U(Q), A(BAD)],
            "rejected-rating": 2.0,
        },
    ),
    "response columns": ("pairs", {"prompt": Q, "chosen_response": GOOD, "rejected_response": BAD}),
    "sharegpt": (
        "messages",
        {
            "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": Q}],
            "chosen": {"from": "gpt", "value": GOOD},
            "rejected": {"from": "gpt", "value": BAD},
        },
    ),
    "messages": (
        "messages",
        {"messages": [S("Be brief."), U(Q)], "chosen": A(GOOD), "rejected": A(BAD)},
    ),
    "messages with a system turn beside conversations": (
        "messages",
        {"messages": [S("Be brief."), U(Q)], "chosen": [U(Q), A(GOOD)], "rejected": [U(Q), A(BAD)]},
    ),
    "shp a": ("shp", {"history": Q, "human_ref_A": GOOD, "human_ref_B": BAD, "labels": 1, "score_A": 9}),
    "shp b": ("shp", {"history": Q, "human_ref_A": BAD, "human_ref_B": GOOD, "labels": 0}),
    "safe rlhf": (
        "safe_rlhf",
        {
            "prompt": Q,
            "response_0": BAD,
            "response_1": GOOD,
            "better_response_id": 1,
            "safer_response_id": 0,
        },
    ),
    "helpsteer 2": (
        "helpsteer",
        {"prompt": Q, "response_1": GOOD, "response_2": BAD, "preference_strength": -1},
    ),
    "helpsteer 3": (
        "helpsteer",
        {"context": [U(Q)], "response1": BAD, "response2": GOOD, "overall_preference": 2},
    ),
    "webgpt": (
        "two_answers",
        {"question": {"full_text": Q}, "answer_0": BAD, "score_0": -0.5, "answer_1": GOOD, "score_1": 0.5},
    ),
    "arena": (
        "arena",
        {"conversation_a": [U(Q), A(BAD)], "conversation_b": [U(Q), A(GOOD)], "winner": "model_b"},
    ),
    "arena columns": (
        "arena_columns",
        {
            "prompt": json.dumps([Q]),
            "response_a": json.dumps([GOOD]),
            "response_b": json.dumps([BAD]),
            "winner_model_a": 1,
            "winner_model_b": 0,
            "winner_tie": 0,
        },
    ),
    "nectar": (
        "ranked",
        {
            "prompt": f"\n\nHuman: {Q}\n\nAssistant: ",
            "answers": [
                {"answer": BAD, "rank": 7.0},
                {"answer": "Some.", "rank": 2.0},
                {"answer": GOOD, "rank": 1.0},
            ],
        },
    ),
    "ultrafeedback": (
        "scored",
        {
            "instruction": Q,
            "completions": [
                {"response": BAD, "overall_score": 3.0},
                {"response": GOOD, "overall_score": 8.5},
            ],
        },
    ),
    "stack exchange, paired": (
        "pairs",
        {"qid": 1, "question": Q, "date": "2020", "metadata": ["url"], "response_j": GOOD, "response_k": BAD},
    ),
    "stack exchange, scored": (
        "scored",
        {
            "qid": 1,
            "question": Q,
            "answers": [
                {"answer_id": 1, "author": "x", "pm_score": 1, "selected": False, "text": BAD},
                {"answer_id": 2, "author": "y", "pm_score": 4, "selected": True, "text": GOOD},
            ],
        },
    ),
    "distilabel capybara": (
        "pairs",
        {
            "source": "s",
            "conversation": [{"input": Q, "output": GOOD}],
            "original_response": GOOD,
            "generation_prompt": [Q],
            "chosen": [U(Q), A(GOOD)],
            "rejected": [U(Q), A(BAD)],
            "rating_chosen": 5,
            "rating_rejected": 2,
        },
    ),
    "distilabel math": (
        "alpaca",
        {"instruction": Q, "chosen_response": GOOD, "rejected_response": BAD, "chosen_rating": 9},
    ),
    "skywork": (
        "pairs",
        {"chosen": [U(Q), A(GOOD)], "rejected": [U(Q), A(BAD)], "source": "s"},
    ),
    "ultrainteract": (
        "messages",
        {
            "id": "1",
            "task": "t",
            "trajectory": [{"from": "user", "value": Q}],
            "chosen": GOOD,
            "rejected": BAD,
        },
    ),
    "mt-bench human": (
        "arena",
        {
            "question_id": 81,
            "model_a": "x",
            "model_b": "y",
            "winner": "model_b",
            "judge": "j",
            "conversation_a": [U(Q), A(BAD), U("Why?"), A("So.")],
            "conversation_b": [U(Q), A(GOOD), U("Why?"), A("Salt.")],
            "turn": 1,
        },
    ),
    "alpaca farm": (
        "labeled",
        {"instruction": Q, "input": "", "output_1": BAD, "output_2": GOOD, "preference": 2},
    ),
    "judge bench": (
        "labeled",
        {"pair_id": "1", "question": Q, "response_A": GOOD, "response_B": BAD, "label": "A>B"},
    ),
    "a and b": ("labeled", {"prompt": Q, "answer_a": BAD, "answer_b": GOOD, "winner": "b"}),
    "tldr preference": ("pairs", {"prompt": Q, "chosen": GOOD, "rejected": BAD}),
    "scores in a list": ("scored", {"prompt": Q, "responses": [BAD, GOOD], "scores": [1, "2.5"]}),
}


TIES: dict[str, dict[str, Any]] = {
    "helpsteer": {"context": [U(Q)], "response1": GOOD, "response2": BAD, "overall_preference": 0},
    "arena": {"conversation_a": [U(Q), A("a")], "conversation_b": [U(Q), A("b")], "winner": "tie"},
    "arena, both bad": {
        "conversation_a": [U(Q), A("a")],
        "conversation_b": [U(Q), A("b")],
        "winner": "tie (bothbad)",
    },
    "orca": {"system": "", "input": Q, "chosen": GOOD, "rejected": BAD, "status": "tie"},
    "ranked": {"prompt": Q, "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 1}]},
    "alpaca farm": {"instruction": Q, "output_1": "a", "output_2": "b", "preference": 1.5},
    "a and b": {"prompt": Q, "response_a": "a", "response_b": "b", "preference": "A=B"},
    "webgpt": {"prompt": Q, "answer_0": "a", "score_0": 0.0, "answer_1": "b", "score_1": 0.0},
}


RANKED = {"prompt": Q, "responses": ["low", "top", "mid", "also mid"], "scores": [1, 5, 3, 3]}
