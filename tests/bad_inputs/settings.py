"""Broken settings: names, values, what does not go together, and the command line itself."""

from __future__ import annotations

from bad_inputs.case import LORA, RECORD, SETTINGS, Case, write

ARGUMENTS = tuple(part for name, value in SETTINGS.items() for part in (f"--{name}", value))


def value(says: str, name: str, text: str, **others: str) -> Case:
    return Case(says, settings={name: text, **others})


CASES = {
    # --- names
    "an unknown name": value("Unknown setting learning_rat", "learning_rat", "1e-4"),
    "a name of a plugin that is not asked for": value("Unknown setting lora_rank", "lora_rank", "4"),
    "a required name not given": Case("dataset_name_or_path is not set", settings={"dataset_name_or_path": None}),
    "a name with a newline": value("Unknown setting see\\nd", "see\nd", "1"),
    "a name with an escape sequence": value("Unknown setting see\\x1b[31md", "see\x1b[31md", "1"),
    # --- values
    "a word for a number": value(
        "max_steps: expected a whole number of at least -1 and at most 1000000000, got 'many'", "max_steps", "many"
    ),
    "a fraction for a whole number": value(
        "max_steps: expected a whole number of at least -1 and at most 1000000000, got '1.5'", "max_steps", "1.5"
    ),
    "nothing for a number": value("learning_rate: expected a number of at least 0, got ''", "learning_rate", ""),
    "NaN": value("learning_rate: expected a number of at least 0, got 'nan'", "learning_rate", "nan"),
    "infinity": value("learning_rate: expected a number of at least 0, got 'inf'", "learning_rate", "inf"),
    "below the least": value("learning_rate: expected a number of at least 0, got '-1'", "learning_rate", "-1"),
    "no steps": value("max_steps is 0, so nothing would be trained", "max_steps", "0"),
    "2**63 steps": value(
        "max_steps: expected a whole number of at least -1 and at most 1000000000, got '9223372036854775808'",
        "max_steps",
        str(2**63),
    ),
    "2**53 + 1 steps": value(
        "max_steps: expected a whole number of at least -1 and at most 1000000000, got '9007199254740993'",
        "max_steps",
        str(2**53 + 1),
    ),
    "steps of 300 digits": value(
        "max_steps: expected a whole number of at least -1 and at most 1000000000, got '999999999999999999999",
        "max_steps",
        "9" * 300,
    ),
    "steps of 5,000 digits": value(
        "max_steps: expected a whole number of at least -1 and at most 1000000000, got '999999999999999999999",
        "max_steps",
        "9" * 5000,
    ),
    "10**12 epochs": value(
        "num_train_epochs: expected a number above 0 and at most 10000, got '1e12'",
        "num_train_epochs",
        "1e12",
        max_steps="-1",
    ),
    "10**300 epochs": value(
        "num_train_epochs: expected a number above 0 and at most 10000, got '1e300'",
        "num_train_epochs",
        "1e300",
        max_steps="-1",
    ),
    "10**300 waves": value(
        "num_cycles: numbers here are 0 or from 1.2e-38 to 3.4e+38 in size, which is what 32 bits hold, got '",
        "num_cycles",
        "1e308",
        lr_scheduler_type="cosine",
    ),
    "a power of 10**308": value(
        "power: numbers here are 0 or from 1.2e-38 to 3.4e+38 in size, which is what 32 bits hold, got '1e308",
        "power",
        "1e308",
        lr_scheduler_type="polynomial",
    ),
    "a batch of 2**63": value(
        "per_device_train_batch_size: whole numbers here go up to 9223372036854775807, got '92233720368547758",
        "per_device_train_batch_size",
        str(2**63),
    ),
    "2**63 micro-batches": value(
        "gradient_accumulation_steps: whole numbers here go up to 9223372036854775807, got '92233720368547758",
        "gradient_accumulation_steps",
        str(2**63),
    ),
    "an evaluation batch of 2**63": Case(
        "per_device_eval_batch_size: whole numbers here go up to 9223372036854775807, got '922337203685477580",
        (write("data/dev.json", RECORD),),
        {"per_device_eval_batch_size": str(2**63)},
    ),
    "a length of 2**63": value(
        "max_length: whole numbers here go up to 9223372036854775807, got '9223372036854775808'",
        "max_length",
        str(2**63),
    ),
    "a prompt's length of 2**63": value(
        "src_length: whole numbers here go up to 9223372036854775807, got '9223372036854775808'",
        "src_length",
        str(2**63),
    ),
    "lines every 2**63 steps": value(
        "logging_steps: whole numbers here go up to 9223372036854775807, got '9223372036854775808'",
        "logging_steps",
        str(2**63),
    ),
    "checkpoints every 2**63 steps": value(
        "save_steps: whole numbers here go up to 9223372036854775807, got '9223372036854775808'",
        "save_steps",
        str(2**63),
        save_strategy="steps",
    ),
    "warm-up of 2**63 steps": value(
        "warmup_steps: whole numbers here go up to 9223372036854775807, got '9223372036854775808'",
        "warmup_steps",
        str(2**63),
    ),
    "a seed of 2**31": value(
        "seed: expected a whole number of at least 0 and at most 2147483647, got '2147483648'", "seed", str(2**31)
    ),
    "a loss scale of 10**300": value(
        "scale_loss: numbers here are 0 or from 1.2e-38 to 3.4e+38 in size, which is what 32 bits hold, got '",
        "scale_loss",
        "1e300",
        fp16="true",
    ),
    "a decay of 10**300": value(
        "weight_decay: numbers here are 0 or from 1.2e-38 to 3.4e+38 in size, which is what 32 bits hold, got",
        "weight_decay",
        "1e300",
    ),
    "a learning rate of 10**300": value(
        "learning_rate: numbers here are 0 or from 1.2e-38 to 3.4e+38 in size, which is what 32 bits hold, go",
        "learning_rate",
        "1e300",
    ),
    "a norm of 10**300": value(
        "max_grad_norm: numbers here are 0 or from 1.2e-38 to 3.4e+38 in size, which is what 32 bits hold, go",
        "max_grad_norm",
        "1e300",
    ),
    "an epsilon of 10**300": value(
        "adam_epsilon: numbers here are 0 or from 1.2e-38 to 3.4e+38 in size, which is what 32 bits hold, got",
        "adam_epsilon",
        "1e300",
    ),
    "10**9 processes": value(
        "dataset_num_proc: expected a whole number of at least 1 and at most 1024, or none, got '1000000000'",
        "dataset_num_proc",
        "1000000000",
    ),
    "0 processes": value(
        "dataset_num_proc: expected a whole number of at least 1 and at most 1024, or none, got '0'",
        "dataset_num_proc",
        "0",
    ),
    "10**12 samples' tokens": value(
        "A prompt of 26 tokens and an answer of max_new_tokens 1000000000000 do not fit into the model's 64 p",
        "max_new_tokens",
        "1000000000000",
        num_samples="1",
    ),
    "an unknown schedule": value(
        "lr_scheduler_type: expected one of linear, cosine, polynomial, constant, constant_with_warmup",
        "lr_scheduler_type",
        "sine",
    ),
    "an unknown device": value("There is no device 'tpu'", "device", "tpu"),
    "a device that is not there": value(
        "Device gpu:99 is not there: the PaddlePaddle that is installed computes on CPUs alone", "device", "gpu:99"
    ),
    "a device with a newline": value("There is no device 'cpu\\nx'", "device", "cpu\nx"),
    "a device numbered 2**63": value(
        "Device gpu:9223372036854775808 is not there: the PaddlePaddle that is installed computes on CPUs alo",
        "device",
        f"gpu:{2**63}",
    ),
    "neither true nor false": value("do_train: expected true or false, got 'maybe'", "do_train", "maybe"),
    "a word for a switch": value("lazy: expected true or false, got 'often'", "lazy", "often"),
    "an unknown metric": value(
        "metric_for_best_model: expected one of loss, ppl, objective, accuracy, got 'beauty'",
        "metric_for_best_model",
        "beauty",
        load_best_model_at_end="true",
    ),
    # --- what does not go together
    "two precisions": value("bf16 and fp16 are both set", "bf16", "true", fp16="true"),
    "a stream without steps": value(
        "lazy streams the data, whose length is then unknown", "lazy", "true", max_steps="-1"
    ),
    "nothing to do": value(
        "do_train and do_eval are both false, so there is nothing to do", "do_train", "false", do_eval="false"
    ),
    "the best model without evaluations": value(
        "load_best_model_at_end needs a checkpoint at each evaluation, and save_strategy is no, evaluation_st",
        "load_best_model_at_end",
        "true",
    ),
    "a setting twice by two names": value(
        "preprocessing_num_workers and dataset_num_proc are one setting, which is given twice",
        "preprocessing_num_workers",
        "1",
        dataset_num_proc="1",
    ),
    # --- settings of plugins
    "a rank of 0": Case(
        "lora_rank: expected a whole number of at least 1, got '0'", base=LORA, settings={"lora_rank": "0"}
    ),
    "a rank of 10**6": Case(
        "lora_rank 1000000 is more than the 48 dimensions of the widest layer that it adapts, and an update h",
        base=LORA,
        settings={"lora_rank": "1000000"},
    ),
    "a rank of 10**18": Case(
        "lora_rank 1000000000000000000 is more than the 48 dimensions of the widest layer that it adapts, and",
        base=LORA,
        settings={"lora_rank": str(10**18)},
    ),
    "a rank of 2**63": Case(
        "lora_rank: whole numbers here go up to 9223372036854775807, got '9223372036854775808'",
        base=LORA,
        settings={"lora_rank": str(2**63)},
    ),
    "an alpha of 10**308": Case(
        "lora_alpha: numbers here are 0 or from 1.2e-38 to 3.4e+38 in size, which is what 32 bits hold, got '",
        base=LORA,
        settings={"lora_alpha": "1e308"},
    ),
    "an alpha that is NaN": Case(
        "lora_alpha: expected a number above 0, or none, got 'nan'", base=LORA, settings={"lora_alpha": "nan"}
    ),
    "a dropout of 1": Case(
        "lora_dropout: expected a number of at least 0 and at most 0.99, got '1'",
        base=LORA,
        settings={"lora_dropout": "1"},
    ),
    "an unknown target": Case(
        "Target 'w_pack' matches no layer", base=LORA, settings={"lora_target_modules": "w_pack"}
    ),
    "a broken expression": Case(
        "Target '.*(q_proj' is not a valid regular expression", base=LORA, settings={"lora_target_modules": ".*(q_proj"}
    ),
    "an expression that never ends": Case(
        "Target '(?:.|..|...)*(?:.|..|...)*[A-C]' takes too long to match model.layers.0.self_attn.q_proj",
        base=LORA,
        settings={"lora_target_modules": "(?:.|..|...)*(?:.|..|...)*[A-C]"},
    ),
    "a list that is no JSON": Case(
        "Target '[\"q_proj\"' is not a valid regular expression",
        base=LORA,
        settings={"lora_target_modules": '["q_proj"'},
    ),
    "nproc of 0": value(
        "nproc: expected a whole number of at least 1 and at most 1024, or auto, got '0'", "nproc", "0"
    ),
    "nproc of -1": value(
        "nproc: expected a whole number of at least 1 and at most 1024, or auto, got '-1'", "nproc", "-1"
    ),
    "nproc of 10**9": value(
        "nproc: expected a whole number of at least 1 and at most 1024, or auto, got '1000000000'",
        "nproc",
        "1000000000",
    ),
    "nproc that is a word": value("nproc: expected a number, or auto, got 'all'", "nproc", "all"),
    "a tensor degree of 10**9": value(
        "tensor parallel degree 1000000000 x pipeline parallel degree 1 needs 1000000000 processes or a multi",
        "tensor_parallel_degree",
        "1000000000",
    ),
    "a noise that is NaN": value(
        "neftune_noise_alpha: expected a number above 0, got 'nan'", "neftune_noise_alpha", "nan", neftune="true"
    ),
    "a noise of 10**308": value(
        "neftune_noise_alpha: numbers here are 0 or from 1.2e-38 to 3.4e+38 in size, which is what 32 bits ho",
        "neftune_noise_alpha",
        "1e308",
        neftune="true",
    ),
    "an unknown quantization": value(
        "weight_quantize_algo: expected one of fp4, nf4, weight_only_int4, weight_only_int8, got 'nf3'",
        "weight_quantize_algo",
        "nf3",
    ),
    "quantization without an adapter": value(
        "Plugin nf4 quantizes the base model, which then cannot be trained as a whole", "weight_quantize_algo", "nf4"
    ),
    # --- the command line
    "two files": Case(
        "Unexpected 'b.json'", (write("a.json", "{}"), write("b.json", "{}")), typed=("run", "a.json", "b.json")
    ),
    "no command of that name": Case("There is no command 'rnu'", typed=("rnu",)),
    "a word too many": Case("Unexpected 'more'", typed=("run", *ARGUMENTS, "out", "more")),
    "--plugin without a name": Case("--plugin needs a name", typed=("run", *ARGUMENTS, "--plugin")),
    "a setting without its value": Case("seed: the value is missing", typed=("run", *ARGUMENTS, "--seed")),
    "-- alone": Case("Settings file 1 is none of .yaml, .json and .toml", typed=("run", *ARGUMENTS, "--", "1")),
    "an option without a name": Case("Unknown setting ''", typed=("run", *ARGUMENTS, "--=1")),
    "generate: no model": Case(
        "Missing option '--model_name_or_path' / '--model-name-or-path'", typed=("generate", "--prompt", "hello")
    ),
    "generate: an unknown option": Case(
        "No such option '--promt'", typed=("generate", "--model_name_or_path", "model", "--promt", "a")
    ),
    "generate: a batch of 0": Case(
        "Invalid value for '--batch_size' / '--batch-size': 0 is not in the range x>=1",
        typed=("generate", "--model_name_or_path", "model", "--prompt", "a", "--batch_size", "0"),
    ),
    "generate: top_k below 0": Case(
        "top_k: expected a whole number of at least 0, got '-1'",
        typed=("generate", "--model_name_or_path", "model", "--prompt", "a", "--top_k", "-1"),
    ),
    "generate: answers of 10**18 tokens": Case(
        "A prompt of 17 tokens and an answer of max_new_tokens 1000000000000000000 do not fit into the model'",
        typed=("generate", "--model_name_or_path", "model", "--prompt", "a", "--max_new_tokens", str(10**18)),
    ),
    "generate: a temperature of 1e-320": Case(
        "temperature: numbers here are 0 or from 1.2e-38 to 3.4e+38 in size, which is what 32 bits hold, got",
        typed=("generate", "--model_name_or_path", "model", "--prompt", "a", "--top_k", "0", "--temperature", "1e-320"),
    ),
    "generate: top_k of 2**63": Case(
        "top_k: whole numbers here go up to 9223372036854775807, got '9223372036854775808'",
        typed=("generate", "--model_name_or_path", "model", "--prompt", "a", "--top_k", str(2**63)),
    ),
    "generate: a prompt that is too long": Case(
        "A prompt of 416 tokens and an answer of max_new_tokens 128 do not fit into the model's 64 positions",
        typed=("generate", "--model_name_or_path", "model", "--prompt", "river " * 100),
    ),
    "merge: a size that is none": Case(
        "'big' is no size",
        typed=(
            *("merge", "--model_name_or_path", "model", "--lora_path", "done", "--output_path", "merged"),
            *("--max_shard_size", "big"),
        ),
    ),
    "plugins: an unknown option": Case("No such option '--xml'", typed=("plugins", "--xml")),
}
