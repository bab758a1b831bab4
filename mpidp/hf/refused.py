"""Lists model families that cannot be imported. For each family, the table REFUSED has the reason, and the nearest family that
can be imported. Pure, without torch."""

from __future__ import annotations

from reprlib import repr as short

from mpidp.hf.families import BY_MODEL_TYPE, FAMILIES

MOE, VISION, CONV, STATE = "a mixture of experts", "inputs of images or sound", "layers of convolutions", "state-space layers"
REFUSED = {  # model_type -> (what mpidp's Transformer does not have, the nearest family)
    **dict.fromkeys(("mixtral", "minimax", "dbrx"), (MOE, "MistralForCausalLM")),
    **dict.fromkeys(("llama4", "llama4_text"), (MOE, "LlamaForCausalLM")),
    **dict.fromkeys(("qwen2_moe",), (MOE, "Qwen2ForCausalLM")),
    **dict.fromkeys(("qwen3_moe", "qwen3_next", "gpt_oss", "glm4_moe", "ernie4_5_moe"), (MOE, "Qwen3ForCausalLM")),
    **dict.fromkeys(("olmoe", "flex_olmo"), (MOE, "Olmo2ForCausalLM")),
    **dict.fromkeys(("granitemoe", "granitemoeshared", "granitemoehybrid"), (MOE, "GraniteForCausalLM")),
    "phimoe": (MOE, "Phi3ForCausalLM"),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), (f"{MOE} and latent attention", "LlamaForCausalLM")),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm2_vl"), (CONV, "Qwen3ForCausalLM")),
    **dict.fromkeys(("gemma3", "gemma3n", "paligemma"), (VISION, "Gemma3ForCausalLM")),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen2_audio", "qwen2_5_omni"), (VISION, "Qwen2ForCausalLM")),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), (VISION, "Qwen3ForCausalLM")),
    **dict.fromkeys(("mllama", "llava", "llava_next", "llava_onevision", "idefics3", "smolvlm"), (VISION, "LlamaForCausalLM")),
    **dict.fromkeys(("mistral3", "pixtral", "voxtral"), (VISION, "MistralForCausalLM")),
    **dict.fromkeys(("phi4_multimodal",), (VISION, "Phi3ForCausalLM")),
    **dict.fromkeys(("mamba", "mamba2", "jamba", "bamba", "falcon_h1", "falcon_mamba", "zamba2", "nemotron_h"),
                    (STATE, "LlamaForCausalLM")),
    **dict.fromkeys(("recurrent_gemma",), ("recurrent layers", "Gemma2ForCausalLM")),
    **dict.fromkeys(("bloom", "mpt"), ("ALiBi positions", "GPT2LMHeadModel")),
    **dict.fromkeys(("gpt_neo", "gptj", "opt", "codegen", "gpt_bigcode", "xglm"), ("", "GPT2LMHeadModel")),
    **dict.fromkeys(("falcon", "phi", "persimmon", "gpt_neox_japanese"), ("", "GPTNeoXForCausalLM")),
    **dict.fromkeys(("cohere", "cohere2", "helium", "glm", "glm4"),
                    ("rotary positions that pair neighbouring dimensions", "LlamaForCausalLM")),
    **dict.fromkeys(("olmo",), ("norms without gains", "LlamaForCausalLM")),
    **dict.fromkeys(("stablelm", "nemotron", "apertus"), ("", "LlamaForCausalLM")),
    **dict.fromkeys(("t5", "bart", "mt5", "t5gemma"), ("an encoder", "GPT2LMHeadModel")),
    **dict.fromkeys(("bert", "roberta", "modernbert", "deberta-v2"), ("attention in both directions", "GPT2LMHeadModel")),
}


def refusal(architectures: object, model_type: object) -> str:
    """Return the error message for a model whose family is not supported. The arguments are two fields of the model's
    config.json. Pure."""
    if isinstance(model_type, str) and (near := BY_MODEL_TYPE.get(model_type)):
        return (
            f"architectures={short(architectures)} is not supported. For model_type={short(model_type)}, mpidp supports only "
            f"{near.architecture}. If the files contain the weights of a language model, copy the folder, and set architectures "
            f"to [\"{near.architecture}\"] in the copy's config.json. Otherwise, use the folder of a model of this architecture"
        )
    reason, nearest = REFUSED.get(model_type, ("", "")) if isinstance(model_type, str) else ("", "")
    has = f", because it has {reason}, which mpidp's Transformer does not have" if reason else ""
    named = [family.architecture for family in FAMILIES]
    other = f" The nearest supported family is {nearest}." if nearest else ""
    return (
        f"the family with architectures={short(architectures)} and model_type={short(model_type)} is not supported{has}.{other} "
        f"Supported are {', '.join(named)}"
    )
