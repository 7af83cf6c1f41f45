"""Which TRL this was tested with, and what of it is relied upon: checked at import, so that nothing falls back in silence."""

from __future__ import annotations

import inspect

TESTED = ("1.16",)

# The private methods of GRPOTrainer that are overridden or called, with their parameters as tested.
METHODS: dict[str, tuple[str, ...]] = {
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    "_generate_and_score_completions": ("self", "inputs"),
    "_get_per_token_logps_and_entropies": (
        "self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy", "compute_aux_loss", "pixel_values",
        "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles", "image_sizes", "token_type_ids", "mm_token_type_ids",
        "image_position_ids",
    ),
    "_compute_loss": ("self", "model", "inputs"),
    "_tokenize_prompts": ("self", "prompts"),
    "_get_train_sampler": ("self", "dataset"),
    "_save_checkpoint": ("self", "model", "trial"),
    "_load_optimizer_and_scheduler": ("self", "checkpoint"),
}  # fmt: skip
FUNCTIONS: dict[str, tuple[str, ...]] = {
    "add_fused_lm_head": ("model", "temperature", "cast_lm_head_to_fp32", "outputs"),
    "maybe_gather_lm_head_ctx": ("params",),
    "nanstd": ("tensor", "dim", "keepdim"),
}


def check(version: str | None = None, trainer: type | None = None, functions: object | None = None) -> None:
    """Raises ImportError for a TRL that was not tested, naming what differs; by default of the TRL that is installed."""
    if version is None:
        try:
            import trl
            from trl import GRPOTrainer
            from trl.trainer import utils
        except ImportError as error:
            raise ImportError(f"acpo.integrations.trl needs TRL {TESTED[-1]}: pip install -c constraints.txt -e '.[trl]' ({error})") from None
        version, trainer, functions = trl.__version__, GRPOTrainer, utils
    if not any(version == tested or version.startswith(f"{tested}.") for tested in TESTED):
        raise ImportError(f"acpo.integrations.trl was tested with TRL {', '.join(TESTED)}, and this is {version}: pip install 'trl=={TESTED[-1]}.*'")
    wanted = {**{name: (trainer, names) for name, names in METHODS.items()}, **{name: (functions, names) for name, names in FUNCTIONS.items()}}
    for name, (owner, parameters) in wanted.items():
        found = getattr(owner, name, None)
        got = None if found is None else tuple(inspect.signature(found).parameters)
        if got != parameters:
            what = "does not exist" if got is None else f"takes ({', '.join(got)})"
            raise ImportError(f"acpo.integrations.trl: {name} of TRL {version} {what}; it was tested with ({', '.join(parameters)})")
