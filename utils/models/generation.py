"""How a summarizer writes: its checkpoint's generation settings, the flags over them, and this suite's defaults.

All settings end up in the model's `generation_config`, which is saved with it: Transformers' plain `generate` then
writes what this suite writes.
"""

from utils.errors import UsageError
from utils.models.tokenizer import check_length

# what is used if neither a flag nor the checkpoint says something
DEFAULTS = {"num_beams": 4, "length_penalty": 1.0, "min_new_tokens": 0, "max_new_tokens": 128,
            "no_repeat_ngram_size": 0}  # fmt: skip
# the same settings with the start token counted
TOTALS = {"min_new_tokens": "min_length", "max_new_tokens": "max_length"}
OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
OF_OUTPUTS = ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states")
# settings that are refused, each with the values that switch it off
REFUSED = {
    "num_beam_groups": (None, 1), "diversity_penalty": (None, 0), "constraints": (None,), "force_words_ids": (None,),
    "penalty_alpha": (None, 0), "dola_layers": (None,), "num_return_sequences": (None, 1), "guidance_scale": (None, 1),
    "prompt_lookup_num_tokens": (None,), "assistant_early_exit": (None,), "use_mtp": (None, False),
    "stop_strings": (None,), "max_time": (None,), "token_healing": (None, False),
}  # fmt: skip


def settle_generation(model, flags: dict, name: str) -> None:
    """Puts the settings that hold into `model.generation_config`: flags, else the checkpoint's own, else DEFAULTS.

    `flags` has the names of DEFAULTS, with None for a flag that is not set. Sampling is switched off, so that a run can
    be repeated. Raises UsageError, which names `name`, for settings that this suite cannot follow.
    """
    config = model.generation_config
    config._from_model_config = None  # it is no longer
    if not model.config.is_encoder_decoder:
        config.min_length = config.max_length = None  # of a language model, they count the prompt too
    for setting, off in REFUSED.items():
        if getattr(config, setting, None) not in off:
            raise UsageError(
                f"{name}: its generation_config.json sets {setting}, which is not supported here; "
                "remove it from that file"
            )
    for setting, default in DEFAULTS.items():
        total = TOTALS.get(setting, setting)
        if flags[setting] is not None:
            setattr(config, total, None)
            setattr(config, setting, flags[setting])
        elif getattr(config, setting) is None and getattr(config, total) is None:
            setattr(config, setting, default)
    for setting in TOTALS:
        if getattr(config, setting) is not None:  # it comes first in `generate`, which warns of both
            setattr(config, TOTALS[setting], None)
    config.min_new_tokens = config.min_new_tokens or None  # 0 is no minimum
    # Transformers saves no setting that has no effect
    unused = (*OF_OUTPUTS, *OF_SAMPLING, *(("length_penalty", "early_stopping") if config.num_beams == 1 else ()))
    for setting in unused:
        setattr(config, setting, None)
    if config.do_sample:
        config.do_sample = False

    least, most = config.min_new_tokens or (config.min_length or 1) - 1, most_new_tokens(model)
    if least > most or most < 1:
        raise UsageError(
            f"{name}: at least {least} and at most {most} tokens are to be generated; "
            "set both --min_new_tokens and --max_new_tokens (what is not set is the model's own)"
        )
    if model.config.is_encoder_decoder:
        check_length(model.get_decoder(), "max_new_tokens", most)


def most_new_tokens(model) -> int:
    """The most tokens that the model generates, once its settings are settled."""
    return model.generation_config.max_new_tokens or model.generation_config.max_length - 1


def describe_generation(model, source_prefix: str | None) -> str:
    """The settings that hold, in one line; it also names a source prefix of the checkpoint's that is not used."""
    shown = {
        name: value for name, value in model.generation_config.to_diff_dict().items()
        if name == "forced_bos_token_id" or not name.endswith(("_token_id", "_version", "_cache", "_config"))
    }  # fmt: skip
    text = "generation: " + ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None)
    own = ((getattr(model.config, "task_specific_params", None) or {}).get("summarization") or {}).get("prefix")
    if own and not source_prefix:
        text += f"; the model's configuration names a prefix for summaries: --source_prefix {own!r}"
    return text
