"""Suggests a key of the configuration for an unknown name, which another trainer may use or which may be misspelt."""

import difflib

from pydantic import BaseModel

from raphael_dist.config.types import keys_of

# Names in diffusers, transformers, DeepSpeed and other trainers. Equal names are not listed.
_OTHER_NAMES = {
    "train.global_batch_size": "batch_size gradient_accumulation_steps train_batch_size",
    "train.micro_batch_size": "per_device_train_batch_size train_micro_batch_size_per_gpu",
    "train.max_steps": "max_train_steps num_steps num_epochs num_train_epochs epochs iterations",
    "train.dtype": "bf16 mixed_precision precision",
    "train.compile": "torch_compile",
    "train.caption_dropout": "proportion_empty_prompts",
    "train.log_every": "logging_steps",
    "train.val_every": "eval_steps validation_steps",
    "optim.lr": "learning_rate",
    "optim.eps": "adam_epsilon",
    "optim.weight_decay": "adam_weight_decay",
    "optim.max_grad_norm": "grad_clip gradient_clipping",
    "optim.lr_schedule": "lr_scheduler lr_scheduler_type",
    "optim.warmup_steps": "lr_warmup_steps warmup",
    "optim.kind": "optimizer",
    "run.dir": "log_dir logging_dir out out_dir output output_dir resume resume_from_checkpoint run_dir save_dir work_dir",
    "run.init_from": "init_checkpoint pretrained_model_name_or_path",
    "run.trackers": "report_to",
    "run.project": "project_name tracker_project_name",
    "ema.decay": "ema_decay",
    "ema.enabled": "use_ema",
    "checkpoint.every": "checkpointing_steps save_every save_steps",
    "checkpoint.keep": "checkpoints_total_limit save_total_limit",
    "model.checkpoint_activations": "activation_checkpointing gradient_checkpointing",
    "data.shards": "data data_dir data_path dataset dataset_name train_data_dir train_shards",
    "data.val_shards": "val_data_dir validation_shards",
    "data.workers": "dataloader_num_workers num_workers",
    "data.flip": "random_flip",
    "image.buckets": "image_size resolution",
    "text.encoder": "text_encoder",
    "text.max_tokens": "max_length",
    "diffusion.prediction": "prediction_type rectified flow_matching",
    "diffusion.offset_noise": "noise_offset",
    "diffusion.min_snr_gamma": "snr_gamma",
    "sample.guidance": "guidance_scale",
    "sample.steps": "num_inference_steps",
    "sample.prompts": "validation_prompt validation_prompts",
    "lora.rank": "lora_rank",
}
NAMES_ELSEWHERE = {name: key for key, names in _OTHER_NAMES.items() for name in names.split()}

# Former names of keys. They are refused with the new name, not accepted: one setting has one name.
RENAMED = {
    "data.edges": "data.edge_maps",
    "image.encoder": "image.vae",
    "model.space_backend": "model.expert_backend",
    "optim.clip": "optim.max_grad_norm",
    "optim.decay": "optim.lr_schedule",
    "optim.decay_arguments": "optim.lr_schedule_args",
    "recipe.gate_noise_schedule": "model.gate_noise_schedule",
    "recipe.min_snr_gamma": "diffusion.min_snr_gamma",
    "recipe.offset_noise": "diffusion.offset_noise",
    "recipe.stages": "train.stages",
    "run.fresh": "run.ignore_damaged",
    "run.init_missing": "run.reinit",
    "sample.pictures": "sample.images",
    "train.caption_drop": "train.caption_dropout",
    "train.global_batch": "train.global_batch_size",
    "train.micro_batch": "train.micro_batch_size",
}


def known_key(name: str, config_type: type[BaseModel]) -> str | None:
    """Return the key of the setting that is called `name` in this project or in another trainer, None if there is none.

    For example, "learning_rate" gives "optim.lr". `config_type`: the class of the whole configuration (`Config`).
    """
    plain = _plain(name).rpartition(".")[2]
    return NAMES_ELSEWHERE.get(plain) or next(iter(_keys_named(plain, config_type)), None)


def meant_keys(name: str, config_type: type[BaseModel]) -> list[str]:
    """Return the full keys (section and name) of the settings that a user may have meant by `name`.

    The settings whose key, without its section, is `name` come first: "weight" gives ["edge.weight"]. The setting that
    other trainers call `name` comes last: "learning_rate" gives ["optim.lr"].

    `config_type`: the class of the whole configuration (`Config`).
    """
    plain = _plain(name).rpartition(".")[2]
    elsewhere = NAMES_ELSEWHERE.get(plain)
    return list(dict.fromkeys([*_keys_named(plain, config_type), *([elsewhere] if elsewhere else [])]))


def near_key(name: str, config_type: type[BaseModel]) -> str | None:
    """Return the key (such as optim.lr) of the setting whose name is most similar to `name`; None if none is similar.

    `name` may lack the section. Similar means a ratio of at least 0.75 in `difflib.get_close_matches`.
    `config_type`: the class of the whole configuration (`Config`).
    """
    keys = keys_of(config_type)
    by_name = NAMES_ELSEWHERE | {key.partition(".")[2]: key for key in reversed(keys)} | {key: key for key in keys}
    near = difflib.get_close_matches(_plain(name), by_name, n=1, cutoff=0.75)
    return by_name[near[0]] if near else None


def _plain(name: str) -> str:
    return name.strip().lstrip("-").replace("-", "_").lower()


def _keys_named(name: str, config_type: type[BaseModel]) -> list[str]:
    return [key for key in keys_of(config_type) if key.partition(".")[2] == name]
