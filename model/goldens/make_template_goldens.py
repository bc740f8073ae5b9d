#!/usr/bin/env python3
"""Renders every template in shared/data/templates with transformers and writes hashes of the outputs.

Run with transformers 5 installed, from anywhere:
    python model/goldens/make_template_goldens.py

The templates are not ours to copy, so template_goldens.json holds, per template and conversation, the length and the
64-bit FNV-1a hash of what transformers rendered, or the message that the template raised. The clock is frozen.
"""

import datetime as real_datetime
import json
import pathlib
import sys

import jinja2
import transformers
from transformers.utils import chat_template_utils

HERE = pathlib.Path(__file__).resolve().parent
TEMPLATES = HERE.parent.parent.parent / "shared" / "data" / "templates"
FROZEN = real_datetime.datetime(2026, 1, 2, 3, 4, 5)


class FrozenClock(real_datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return FROZEN


chat_template_utils.datetime = FrozenClock

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city: <now> & soon, \"as is\"",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Name, e.g. Zürich"},
                "days": {"type": "integer", "description": "How many"},
            },
            "required": ["city"],
        },
    },
}
# What some templates choke on, in Python too: enums of numbers, defaults, unions, nesting.
RICH_TOOL = {
    "type": "function",
    "function": {
        "name": "plan",
        "description": "",
        "parameters": {
            "type": "object",
            "properties": {
                "kind": {"type": "string", "enum": ["a", "b"]},
                "limit": {"type": "number", "maximum": 1.5, "default": 0.5},
                "where": {"type": ["string", "null"]},
                "stops": {"type": "array", "items": {"type": "object", "properties": {"x": {"type": "integer"}}}},
            },
        },
    },
}


def call(arguments):
    return {"id": "call12345", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


USER = {"role": "user", "content": "  What's 1 < 2 && \"x\"?\n"}
LONG = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello! \n"},
    {"role": "user", "content": "Grüezi 你好 🙂"},
]
TOOL_TURNS = [
    {"role": "user", "content": "Weather in Zürich?"},
    {"role": "assistant", "content": "", "tool_calls": [call({"city": "Zürich", "days": 3})]},
    {"role": "tool", "name": "get_weather", "tool_call_id": "call12345", "content": "{\"sky\": \"<blue>\"}"},
]

# name, messages, tools, add_generation_prompt, extra
CASES = [
    ("user", [USER], None, True, {}),
    ("user_no_prompt", [USER], None, False, {}),
    ("system", [{"role": "system", "content": "You are terse.\n"}, USER], None, True, {}),
    ("turns", LONG, None, True, {}),
    ("turns_system_done", [{"role": "system", "content": "S"}, *LONG, {"role": "assistant", "content": "Ja."}], None, False, {}),
    ("reasoning", [*LONG[:1], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello", "reasoning_content": "hm"}, LONG[2]], None, True, {}),
    ("no_thinking", LONG, None, True, {"enable_thinking": False, "thinking": False}),
    ("tools", [USER], [TOOL], True, {}),
    ("rich_tool", [USER], [TOOL, RICH_TOOL], True, {}),
    ("tool_turns", TOOL_TURNS, [TOOL, TOOL], True, {}),
    ("tool_turns_text", [TOOL_TURNS[0], {**TOOL_TURNS[1], "content": None, "tool_calls": [call("{\"city\": \"Bern\"}")]}, TOOL_TURNS[2]], [TOOL], True, {}),
    ("parts", [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}], None, True, {}),
]


def render(source, messages, tools, prompt, extra):
    try:
        [text], _ = chat_template_utils.render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=source,
            add_generation_prompt=prompt,
            bos_token="<s>",
            eos_token="</s>",
            **extra,
        )
    except jinja2.exceptions.TemplateSyntaxError as error:
        return {"syntax": str(error)}
    except jinja2.exceptions.UndefinedError as error:
        return {"error": "undefined"}
    except jinja2.exceptions.SecurityError as error:
        return {"error": "security"}
    except jinja2.exceptions.TemplateError as error:
        # Its subclasses are Jinja's own complaints; only raise_exception raises the class itself.
        if type(error) is not jinja2.exceptions.TemplateError:
            return {"error": type(error).__name__, "message": str(error)[:100]}
        return {"raised": str(error)}
    except Exception as error:  # what Python itself refused, such as None + "text"
        return {"error": type(error).__name__, "message": str(error)[:100]}
    data = text.encode()
    return {"bytes": len(data), "fnv1a": f"{fnv1a(data):016x}"}


def fnv1a(data):
    state = 0xCBF29CE484222325
    for byte in data:
        state = (state ^ byte) * 0x100000001B3 % 2**64
    return state


def main():
    if len(sys.argv) == 3:  # a template's name and a case's: print what transformers renders
        [case] = [case for case in CASES if case[0] == sys.argv[2]]
        [text], _ = chat_template_utils.render_jinja_template(
            [case[1]], tools=case[2], chat_template=(TEMPLATES / sys.argv[1]).read_text(),
            add_generation_prompt=case[3], bos_token="<s>", eos_token="</s>", **case[4],
        )
        print(text)
        return
    templates = {}
    for path in sorted(TEMPLATES.rglob("*.jinja")):
        source = path.read_text()
        name = str(path.relative_to(TEMPLATES))
        templates[name] = {case[0]: render(source, *case[1:]) for case in CASES}
    cases = [
        {"name": name, "messages": messages, "tools": tools, "add_generation_prompt": prompt, "extra": extra}
        for name, messages, tools, prompt, extra in CASES
    ]
    out = {
        "made_with": f"transformers {transformers.__version__}, jinja2 {jinja2.__version__}",
        "now": FROZEN.isoformat(),
        "cases": cases,
        "templates": templates,
    }
    (HERE / "template_goldens.json").write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n")
    kinds = [next(iter(r)) for t in templates.values() for r in t.values()]
    print({kind: kinds.count(kind) for kind in set(kinds)}, len(templates), "templates")


main()
