"""Makes the text files of an exported folder, such as tokenizer_config.json. These files name the special tokens of the
training data.

If the run was fine-tuned from a model, the files of that model are kept, except for entries that contradict the training data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from mpidp.data.model_files import TEMPLATE, TEMPLATES
from mpidp.data.special_tokens import SpecialTokens
from mpidp.hf.names import NOT_KEPT

CONFIG, GENERATION = "tokenizer_config.json", "generation_config.json"


def with_begin(tokenizer_json: str, bos: int | None) -> str:
    """Return `tokenizer_json`, changed so that it adds exactly one token to a text: the id `bos` at the beginning. If `bos` is
    None, the result adds no token. Pure."""
    from tokenizers import Tokenizer as Theirs

    theirs = Theirs.from_str(tokenizer_json)
    plain, whole = (theirs.encode("a", add_special_tokens=adds).ids for adds in (False, True))
    if whole == ([] if bos is None else [bos]) + plain:
        return tokenizer_json
    about = json.loads(tokenizer_json)
    made = None
    if bos is not None:
        name = theirs.id_to_token(bos)
        begin = {"SpecialToken": {"id": name, "type_id": 0}}
        first, second = ({"Sequence": {"id": part, "type_id": kind}} for kind, part in enumerate("AB"))
        made = {
            "type": "TemplateProcessing", "single": [begin, first], "pair": [begin, first, second],
            "special_tokens": {name: {"id": name, "ids": [bos], "tokens": [name]}},
        }
    about["post_processor"] = made
    return json.dumps(about, ensure_ascii=False, indent=2)


def text_files(
    special: SpecialTokens, name_of: Mapping[int, str], kept: Mapping[str, Mapping[str, Any]], longest: int
) -> dict[str, Any]:
    """Return {file name: contents} for tokenizer_config.json, generation_config.json and other files. The contents of a JSON
    file are an object. The contents of another file are a string. Pure.

    special: the special tokens of the run. name_of: maps each token id to its text. kept: maps names of JSON files to their
    contents in the model that the run was fine-tuned from. It is empty if there is no such model. longest: the maximum number of
    tokens of a text.
    """
    scratch = not kept
    eod = special.ends[0]
    given = {"eos": name_of[eod], "pad": name_of[eod if special.pad is None else special.pad]}
    if special.bos is not None:
        given["bos"] = name_of[special.bos]
    elif special.template is None:  # a text follows the end-of-document token, as in training
        given["bos"] = name_of[eod]
    template = (special.template or "") + (special.tool_template or "")
    named = {key: name for key, name in special.names.items() if key.endswith("_token") and key in template}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": longest, "clean_up_tokenization_spaces": False,
        "add_bos_token": special.bos is not None, "add_eos_token": False,
    }
    if CONFIG in kept:
        config = {key: value for key, value in kept[CONFIG].items() if key not in NOT_KEPT}
        if "add_bos_token" in config:
            config["add_bos_token"] = special.bos is not None
    elif scratch:
        config |= {f"{key}_token": name for key, name in given.items()}
    else:
        config["eos_token"] = given["eos"]
    config |= {key: name for key, name in named.items() if _text(config.get(key)) != name}
    found: dict[str, Any] = {CONFIG: config}
    if special.template is not None:
        others = _named_templates(config.pop("chat_template", None))
        if special.tool_template is not None:
            others["tool_use"] = special.tool_template
        found |= {f"{TEMPLATES}/{name}.jinja": _with_arguments(text, special.template_args) for name, text in others.items()}
        found[TEMPLATE] = _with_arguments(special.template, special.template_args)
    generation = dict(kept.get(GENERATION, {"_from_model_config": True}))
    if scratch:
        generation |= {key: i for key, i in config_ids(special).items() if i is not None}
        found["special_tokens_map.json"] = {f"{key}_token": config[f"{key}_token"] for key in given}
    model = kept.get("config.json", {})  # eos_token_id is read here if generation_config.json has none
    generation["eos_token_id"] = _ends(kept.get(GENERATION, {}).get("eos_token_id", model.get("eos_token_id")), special.ends)
    found[GENERATION] = generation
    return found


def config_ids(special: SpecialTokens) -> dict[str, Any]:
    """Return the fields bos_token_id, eos_token_id and pad_token_id of config.json, for a run that started from random weights.
    Pure."""
    eod = special.ends[0]
    bos = eod if special.bos is None and special.template is None else special.bos
    return {"bos_token_id": bos, "eos_token_id": eod, "pad_token_id": eod if special.pad is None else special.pad}


def _ends(before: Any, ends: tuple[int, ...]) -> int | list[int]:
    """Return the ids that end a text: first those in `before`, then those in `ends`. A single id is returned as an int. before:
    the field eos_token_id of the model that the run was fine-tuned from. ends: the ids of the training data."""
    first = [i for i in (before if isinstance(before, list) else [before]) if type(i) is int]
    found = list(dict.fromkeys([*first, *ends]))
    return found[0] if len(found) == 1 else found


def _named_templates(stored: Any) -> dict[str, str]:
    """Return {name: template} for the entry `chat_template` of a tokenizer_config.json. The template "default" is left out."""
    listed = [one for one in stored if isinstance(one, dict)] if isinstance(stored, list) else []
    found = {str(one.get("name")): one.get("template") for one in listed}
    return {
        name: text for name, text in found.items()
        if re.fullmatch(r"\w[\w-]*", name) and name != "default" and isinstance(text, str)
    }


def _text(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def _with_arguments(template: str, arguments: Mapping[str, Any]) -> str:
    """Return the template with default values for its variables. apply_chat_template can then render it without arguments.
    arguments: the template arguments of the command prepare."""
    lines = [  # jinja2 removes the end of each line (trim_blocks)
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}\n"
        for name, value in arguments.items()
    ]
    return "".join(lines) + template


def _literal(value: Any) -> str:
    """Return a JSON value in the syntax of jinja2."""
    if value is None:
        return "none"
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(key)}: {_literal(inner)}' for key, inner in value.items())}}}"
    return json.dumps(value, ensure_ascii=False)  # jinja2 does not read surrogate pairs
