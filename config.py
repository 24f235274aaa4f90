"""Configuration: model shape, training settings and their allowed ranges.

Presets and flags are read by `cli.py`; `python train_kd.py --help` lists them. No torch here.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

DIVERGED = 3  # exit code


class Stopped(Exception):
    """A run ended early, with this exit code; the message says why and what is left of it."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


class UserError(ValueError):
    """A user's mistake: the command line prints it as one line and exits with code 2."""


def opt(default, text, *, choices=None, low=None, high=None):
    """A dataclass field with the one-line comment that `--help` prints and its allowed range.

    `low` and `high` are inclusive; `choices` is a tuple of allowed values.
    """
    meta = {"help": text, "choices": choices, "low": low, "high": high}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=meta)
    return field(default=default, metadata=meta)


TYPES = {"bool": bool, "int": int, "int | None": int | None, "float": int | float, "str": str,
         "dict | None": dict | None, "list[str] | None": list | tuple | None}  # fmt: skip
FEATURE_MAPS = ("identity", "elu", "hedgehog")
LAYER_TYPES = ("full_attention", "sliding_attention", "linear_attention")


@dataclass
class ModelConfig:
    """Shape of a (hybrid) decoder. Field names are Hugging Face's; defaults are Qwen3-shaped."""

    vocab_size: int = 257  # rows of the embedding
    hidden_size: int = 256  # width of the residual stream
    intermediate_size: int = 704  # width of the SwiGLU MLP
    num_hidden_layers: int = 6  # blocks
    num_attention_heads: int = 4  # query heads
    num_key_value_heads: int = 4  # key/value heads (GQA when fewer)
    head_dim: int = 64  # size of one softmax head
    rms_norm_eps: float = 1e-6  # added to the mean square
    rope_theta: float = 10000.0  # RoPE base
    rope_scaling: dict | None = None  # llama3 scaling parameters; None = off
    max_position_embeddings: int = 2048  # longest trained context, tokens
    tie_word_embeddings: bool = True  # head shares the embedding matrix
    attention_bias: bool = False  # biases on q, k, v
    attention_output_bias: bool = False  # bias on o_proj
    qk_norm: bool = True  # RMSNorm on every q and k head (Qwen3)
    sliding_window: int = 0  # window of "sliding_attention" layers, tokens; 0 = off
    attention_sink: bool = False  # one learnable extra softmax logit per head
    initializer_range: float = 0.02  # std of the initial weights
    layer_types: list[str] | None = None  # per layer, one of LAYER_TYPES; None = all full
    mixer: list[str] | None = None  # linear mixer of each linear layer, in order
    linear_num_key_heads: int = 0  # q/k heads of linear layers; 0 = num_attention_heads
    linear_num_value_heads: int = 0  # v heads of linear layers; 0 = linear_num_key_heads
    linear_key_head_dim: int = 0  # 0 = head_dim
    linear_value_head_dim: int = 0  # 0 = head_dim
    linear_conv_kernel_dim: int = 4  # width of the short convolution
    linear_bias: bool = False  # biases on q, k, v of linear layers
    linear_rope: bool = False  # rotate q and k of linear layers
    linear_gate: bool = True  # output gate (only gated_deltanet can be without)
    linear_feature_map: str = "elu"  # of linear_attention: one of FEATURE_MAPS
    linear_window: int = 64  # softmax window of hedgehog_window, tokens
    bos_token_id: int | None = None  # None = the tokenizer has none
    eos_token_id: int | None = None  # written at the end of every document

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if not isinstance(value, TYPES[f.type]) or (type(value) is bool and f.type != "bool"):
                raise UserError(f"{f.name}: {value!r} found, {f.type} expected")
        self.linear_num_key_heads = self.linear_num_key_heads or self.num_attention_heads
        self.linear_num_value_heads = self.linear_num_value_heads or self.linear_num_key_heads
        self.linear_key_head_dim = self.linear_key_head_dim or self.head_dim
        self.linear_value_head_dim = self.linear_value_head_dim or self.head_dim
        full = ["full_attention"] * self.num_hidden_layers
        self.layer_types = list(full if self.layer_types is None else self.layer_types)
        n_linear = self.layer_types.count("linear_attention")
        self.mixer = list(["gated_deltanet"] * n_linear if self.mixer is None else self.mixer)
        self.validate(n_linear)

    def validate(self, n_linear: int) -> None:
        """Raise UserError for shapes no forward pass could use."""
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads", "num_key_value_heads", "head_dim", "linear_window",
                     "linear_conv_kernel_dim", "linear_num_key_heads", "linear_num_value_heads",
                     "linear_key_head_dim", "linear_value_head_dim"):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} found, a positive number expected")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_key_value_heads: {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise UserError(
                f"linear_num_value_heads: {self.linear_num_value_heads} is no multiple of "
                f"linear_num_key_heads {self.linear_num_key_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim: {self.head_dim} found, RoPE needs an even number")
        if len(self.layer_types) != self.num_hidden_layers:
            raise UserError(
                f"layer_types: {len(self.layer_types)} entries found, "
                f"num_hidden_layers {self.num_hidden_layers} expected"
            )
        for kind in self.layer_types:
            if kind not in LAYER_TYPES:
                raise UserError(f"layer_types: '{kind}' found, one of {LAYER_TYPES} expected")
        if "sliding_attention" in self.layer_types and self.sliding_window < 1:
            raise UserError("sliding_window: 0 found, a window is needed by sliding_attention")
        if [type(name) for name in self.mixer] != [str] * n_linear:
            raise UserError(f"mixer: {self.mixer} found, {n_linear} names expected")
        if self.linear_rope and n_linear and self.linear_key_head_dim != self.head_dim:
            raise UserError("linear_rope: needs linear_key_head_dim equal to head_dim")
        if self.linear_feature_map not in FEATURE_MAPS:
            raise UserError(
                f"linear_feature_map: '{self.linear_feature_map}' found, one of {FEATURE_MAPS} "
                "expected"
            )
        scaling = (self.rope_scaling or {}).get("rope_type", "default")
        if scaling not in ("default", "llama3"):
            raise UserError(f"rope_scaling: type '{scaling}' found, default or llama3 expected")
        for name in ("factor", "low_freq_factor", "high_freq_factor",
                     "original_max_position_embeddings"):  # fmt: skip
            found = (self.rope_scaling or {}).get(name)
            if scaling == "llama3" and type(found) not in (int, float):
                raise UserError(f"rope_scaling: {name} {found!r} found, llama3 needs a number")

    def mixer_name(self, layer: int) -> str:
        """Name of the linear mixer of block `layer` (which must be linear)."""
        return self.mixer[self.layer_types[:layer].count("linear_attention")]

    def layer_map(self) -> str:
        """One letter per block: F full, S sliding, L linear."""
        return "".join(t[0].upper() for t in self.layer_types)


@dataclass
class Recipe:
    """Optimizer and schedule of one stage."""

    lr: float = opt(3e-4, "peak learning rate", low=0.0)
    muon_lr: float = opt(
        0.0, "peak lr of matrices under Muon; 0 = lr, with updates of AdamW's size", low=0.0
    )
    min_lr_ratio: float = opt(0.1, "last learning rate / peak", low=0.0, high=1.0)
    warmup_steps: int = opt(50, "linear warm-up, steps", low=0)
    schedule: str = opt("cosine", "learning-rate shape", choices=("cosine", "wsd", "constant"))
    decay_fraction: float = opt(
        0.1, "share of steps in the final decay (wsd, constant)", low=0.0, high=1.0
    )
    weight_decay: float = opt(0.0, "decoupled weight decay of matrices", low=0.0)
    grad_clip: float = opt(1.0, "gradient norm limit (align: per mixer); 0 = off", low=0.0)
    use_muon: bool = opt(False, "Muon for hidden matrices, AdamW for the rest")


@dataclass
class StageConfig(Recipe):
    """One stage: how long, how fast, on what loss. Flags are `--<stage>_<field>`."""

    tokens: int = opt(1_000_000, "training tokens of the stage", low=1)
    seq_len: int = opt(512, "tokens per row", low=8)
    batch_tokens: int = opt(49_152, "tokens per optimizer step over all ranks", low=8)
    micro_batch: int = opt(
        0,
        "rows per micro-batch and rank; 0 = 32768 tokens, in train_kd.py on CUDA what "
        "fits, 131072 at most",
        low=0,
    )
    mixer_lr: float = opt(0.0, "peak learning rate of the mixers; 0 = lr", low=0.0)
    unique_tokens: int = opt(
        0, "align: cycle through so many tokens, keeping the teacher's outputs; 0 = off", low=0
    )
    hidden_weight: float = opt(
        1.0, "align: weight of the distance between attention outputs; 0 = off", low=0.0
    )
    heads_weight: float = opt(
        0.0, "align: weight of the mean squared error of the heads, before o_proj; 0 = off", low=0.0
    )
    maps_weight: float = opt(
        0.0,
        "align: weight of the cross-entropy of attention maps (hedgehog_window); 0 = off",
        low=0.0,
    )
    repeat_rows: float = opt(
        0.0, "share of rows in which spans of their own text come again", low=0.0, high=1.0
    )
    train: str = opt("all", "what is trained; feature_maps: those and the factors of "
                     "hedgehog_window; lora: adapters alone",
                     choices=("all", "mixers", "feature_maps", "lora"))  # fmt: skip
    loss: str = opt(
        "forward_kl", "distillation loss", choices=("forward_kl", "reverse_kl", "js", "mse")
    )
    temperature: float = opt(1.0, "softmax temperature of teacher and student", low=1e-3)
    kd_weight: float = opt(1.0, "weight of the distillation loss; 0 = off", low=0.0)
    ce_weight: float = opt(0.0, "weight of next-token cross-entropy; 0 = off", low=0.0)
    top_k: int = opt(0, "compare only the teacher's k likeliest tokens; 0 = all", low=0)
    select_tokens: float = opt(1.0, "distill, long: share of a row's tokens in the loss, where the "
                               "student is most behind; 1 = all", low=0.01, high=1.0)  # fmt: skip

    def identity(self) -> dict:
        """What a run's continuation must share: all but its length. What older checkpoints lack is
        left out where it is off."""
        found = dataclasses.asdict(self)
        del found["tokens"], found["micro_batch"]
        if self.select_tokens == 1:
            del found["select_tokens"]
        if (self.hidden_weight, self.heads_weight, self.maps_weight) == (1, 0, 0):
            del found["hidden_weight"], found["heads_weight"], found["maps_weight"]
        return found

    def rows_per_step(self, name: str) -> int:
        """Rows of `seq_len` tokens in one optimizer step over all ranks."""
        if self.batch_tokens % self.seq_len:
            raise UserError(
                f"--{name}_batch_tokens: {self.batch_tokens} found, "
                f"a multiple of --{name}_seq_len {self.seq_len} expected"
            )
        return self.batch_tokens // self.seq_len

    def steps(self, max_steps: int) -> int:
        """Optimizer steps of the stage; `max_steps` caps them when positive."""
        steps = max(1, self.tokens // self.batch_tokens)
        return min(steps, max_steps) if max_steps else steps


@dataclass
class Transfer:
    """What a linear layer takes over from the softmax layer it replaces, beside q, k, v and o.
    Each part can be left out, to see what it is worth; what it sets is random or as given then."""

    conv: bool = opt(True, "short convolutions pass on the present token; off = random")
    beta: bool = opt(True, "writing strength one half; off = random")
    decay: bool = opt(True, "decays from the teacher's attention distances; off = spread")
    gate: bool = opt(True, "output gate fitted to be open; off = random")
    scale: bool = opt(True, "output scale of every head by least squares; off = 1")
    kv: str = opt("heads", "how grouped k and v are expanded; rows = wrongly, as some published "
                  "pipelines do, to see what it costs", choices=("heads", "rows"))  # fmt: skip


@dataclass
class Search:
    """How `--layers auto:SHARE` chooses the layers that become linear (search.py)."""

    scorer: str = opt(
        "swap", "swap: each layer softmax alone; drop: each linear alone; window: each cut to "
        "--search_window; greedy: one by one; gates: all at once",
        choices=("swap", "drop", "window", "greedy", "gates"),
    )  # fmt: skip
    tokens: int = opt(65_536, "held-out tokens of a score", low=8)
    recall_samples: int = opt(
        16, "prompts of passkey and key_value in a score, of others half as many; 0 = none", low=0
    )
    seq_len: int = opt(1024, "tokens of a held-out row and of a recall question", low=8)
    recall_weight: float = opt(1.0, "weight of recall beside KL", low=0.0)
    gate_steps: int = opt(100, "training steps of the gates", low=1)
    window: int = opt(64, "tokens that the scorer window leaves a layer's attention", low=1)


STAGES = ("align", "block", "distill", "long")
# The published recipe (arXiv 2512.20569); presets override it.
_STAGE_DEFAULTS = {
    "align": dict(
        tokens=100_000_000, lr=1e-3, min_lr_ratio=0.01, train="mixers", batch_tokens=49_152
    ),
    "block": dict(tokens=20_000_000, lr=1e-4, train="lora", batch_tokens=49_152),
    "distill": dict(
        tokens=600_000_000, seq_len=4096, batch_tokens=131_072, lr=7e-6, mixer_lr=1e-4,
        schedule="constant",
    ),
    "long": dict(
        tokens=100_000_000, seq_len=16_384, batch_tokens=131_072, lr=1e-5, kd_weight=0.0,
        ce_weight=1.0,
    ),
}  # fmt: skip


def stage_field(name: str):
    """The nested settings of stage `name` with its own defaults."""
    return field(
        default_factory=lambda: StageConfig(**_STAGE_DEFAULTS[name]), metadata={"group": name}
    )


@dataclass
class TrainConfig:
    """What pretraining and distillation share."""

    data: str = opt("stdlib", "stdlib, a folder of shards, or nanogpt:PATH; several, with their "
                    "shares of the rows: data/web:0.7,data/code:0.3")  # fmt: skip
    packing: str = opt("concatenate", "rows of training text: documents cut anywhere, or whole "
                       "ones by best fit", choices=("concatenate", "best_fit"))  # fmt: skip
    tokenizer: str = opt(
        "",
        "byte, a tiktoken name, or a tokenizer.json; empty = byte (train.py), "
        "the teacher's (train_kd.py)",
    )
    context_len: int = opt(0, "tokens per row; 0 = 512 (train.py), each stage's own (train_kd.py)",
                           low=0)  # fmt: skip
    select_tokens: float = opt(1.0, "share of a row's tokens in the loss, those where it exceeds "
                               "the teacher's or --reference's most; 1 = all (train_kd.py: in "
                               "distill and long)", low=0.01, high=1.0)  # fmt: skip
    doc_mask: bool = opt(True, "documents packed in a row do not see each other")
    epochs: float = opt(
        0.0,
        "passes over the data; 0 = by --max_steps, else 1 (train.py), by each stage's "
        "tokens (train_kd.py)",
        low=0.0,
    )
    max_steps: int = opt(0, "optimizer steps at most, of each stage; 0 = no cap", low=0)
    accumulation_steps: int = opt(
        0, "micro-batches per step over all ranks; 0 = 8 (train.py), as needed (train_kd.py)", low=0
    )
    seed: int = opt(0, "seed of weights and data order", low=0, high=2**32 - 1)
    device: str = opt("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = opt("auto", "compute type; auto = bfloat16 where the hardware has it",
                     choices=("auto", "bfloat16", "float32"))  # fmt: skip
    torch_compile: str = opt("auto", "compile every block; auto = on for CUDA",
                             choices=("auto", "true", "false"))  # fmt: skip
    activation_checkpointing: str = opt("none", "what blocks compute again in the backward",
                                        choices=("none", "selective", "full"))  # fmt: skip
    kernel: str = opt("auto", "linear-attention kernel",
                      choices=("auto", "naive", "chunk", "fla", "mamba_ssm"))  # fmt: skip
    parallel: str = opt(
        "auto", "each rank has whole models (ddp) or pieces (fsdp: FSDP2); auto = fsdp where ddp "
        "would fill half a GPU", choices=("auto", "ddp", "fsdp"),
    )  # fmt: skip
    shard_ranks: int = opt(0, "fsdp: ranks that a model is cut over, groups of which are copies; "
                           "0 = all", low=0)  # fmt: skip
    reshard_after_forward: str = opt(
        "auto", "fsdp: give gathered blocks up until the backward, the teacher's until they are "
        "called again; auto = unless all of them take a tenth of a GPU at most",
        choices=("auto", "always", "never"),
    )  # fmt: skip
    matmul_precision: str = opt("high", "float32 matmuls on CUDA: high = TF32",
                                choices=("highest", "high", "medium"))  # fmt: skip
    log_every: int = opt(1, "steps between console lines", low=1)
    eval_every: int = opt(0, "steps between evaluations; 0 = at stage ends only", low=0)
    eval_tokens: int = opt(65_536, "held-out tokens per evaluation", low=8)
    eval_seq_len: int = opt(0, "tokens per held-out row; 0 = as in the last stage", low=0)
    skip_spikes: float = opt(
        0.0, "leave out steps whose gradient norm is so many times the median of the last 64; 0 = "
        "only what is not finite", low=0.0,
    )  # fmt: skip
    max_skipped: int = opt(10, "steps left out one after another before the run gives up", low=1)
    hang_timeout: float = opt(
        1800.0, "seconds without progress after which a run ends itself; 0 = never", low=0.0
    )
    sample_tokens: int = opt(32, "tokens of each sample completion; 0 = no samples", low=0)
    sample_temperature: float = opt(0.0, "of the sample completions; 0 = greedy", low=0.0)
    run: str = opt("", "name of the run; empty = script and time (under torchrun: --run_name)")
    save_model: bool = opt(True, "write checkpoints and the final model")
    save_model_dir: str = opt("runs", "parent folder of runs")
    save_every: int = opt(0, "steps between checkpoints; 0 = at stage ends only", low=0)
    async_save: bool = opt(False, "write checkpoints in the background, from a copy in memory")
    keep_checkpoints: int = opt(2, "checkpoints kept", low=2)
    resume: str = opt("never", "never, auto (newest good one of --run), or a run or checkpoint")
    tracker: str = opt("none", "where metrics go besides the run's folder",
                       choices=("none", "wandb", "tensorboard"))  # fmt: skip
    wandb_enabled: bool = opt(False, "the same as --tracker wandb")
    wandb_project: str = opt("retort", "Weights & Biases project")
    peak_flops: float = opt(0.0, "dense peak of the device, FLOP/s; 0 = from the table", low=0.0)
    profile: bool = opt(
        False, "write a torch.profiler trace of steps 3 to 5 (several ranks: 11 to 13) into the run"
    )
    dry_run: bool = opt(False, "build everything, print the plan, train nothing")
    plan: bool = opt(False, "print what the run would take of time, memory and disk, by its "
                     "settings and the models' config.json alone, and do not start")  # fmt: skip
    plan_device: str = opt("", "GPUs to plan for, H100 or 8xH100; empty = this machine's")
    plan_mfu: float = opt(0.4, "MFU at which the plan's hours are, of the FLOPs the run needs",
                          low=1e-3, high=1.0)  # fmt: skip


@dataclass
class PretrainConfig(TrainConfig, Recipe):
    """Settings of train.py."""

    num_blocks: int = opt(6, "transformer blocks", low=1)
    num_heads: int = opt(4, "query heads", low=1)
    num_kv_heads: int = opt(0, "key/value heads; 0 = num_heads", low=0)
    embedding_dim: int = opt(256, "width of the residual stream", low=8)
    head_dim: int = opt(0, "size of one head; 0 = embedding_dim / num_heads", low=0)
    mlp_dim: int = opt(0, "width of the SwiGLU MLP; 0 = 8/3 embedding_dim, rounded up to 64", low=0)
    rope_theta: float = opt(10000.0, "RoPE base", low=1.0)
    sliding_window: int = opt(0, "window of softmax layers, tokens; 0 = full", low=0)
    attention_sink: bool = opt(False, "one learnable extra softmax logit per head")
    tie_embeddings: bool = opt(True, "head shares the embedding matrix")
    layers: str = opt("", "layers that start linear: 10,14,20 | 0-5 | all | 3:1; empty = none")
    keep_layers: str = opt("", "the complement: layers that stay softmax")
    mixer: str = opt("gated_deltanet", "linear mixer, or one name per linear layer")
    linear_feature_map: str = opt("elu", "of the mixer linear_attention", choices=FEATURE_MAPS)
    linear_window: int = opt(64, "window of hedgehog_window and sliding_window, tokens", low=1)
    batch_size: int = opt(8, "rows per micro-batch and rank", low=1)
    reference: str = opt(
        "", "model that --select_tokens compares with, of any byte-level tokenizer"
    )

    def stage(self, rows_in_data: int) -> StageConfig:
        """The whole run as one stage, given the number of rows one epoch has."""
        seq_len = self.context_len or 512
        accumulation = self.accumulation_steps or 8
        rows = self.batch_size * accumulation
        steps = math.ceil((self.epochs or 1.0) * rows_in_data / rows)
        if self.max_steps and not self.epochs:
            steps = self.max_steps
        recipe = {f.name: getattr(self, f.name) for f in dataclasses.fields(Recipe)}
        return StageConfig(
            **recipe, seq_len=seq_len, batch_tokens=rows * seq_len, tokens=steps * rows * seq_len,
            micro_batch=self.batch_size, kd_weight=0.0, ce_weight=1.0,
            select_tokens=self.select_tokens,
        )  # fmt: skip


@dataclass
class DistillConfig(TrainConfig):
    """Settings of train_kd.py."""

    teacher: str = opt("models/smollm2-135m", "folder of the teacher")
    student: str = opt("", "folder of the student; empty = the converted teacher")
    layers: str = opt("3:1", "layers that become linear: 10,14,20 | 0-5 | all | 3:1 | auto:0.75")
    keep_layers: str = opt("", "the complement: layers that stay softmax")
    mixer: str = opt("gated_deltanet", "linear mixer, or one name per linear layer")
    aligned: str = opt("", "folder of an aligned student, whose mixers the run begins with")
    linear_rope: bool = opt(False, "rotate q and k of linear layers too (native format only)")
    linear_gate: bool = opt(True, "output gate of gated_deltanet (off: native format only)")
    linear_conv: int = opt(4, "taps of linear layers' short convolutions; 1 = SiLU alone", low=1)
    linear_feature_map: str = opt("elu", "of the mixer linear_attention", choices=FEATURE_MAPS)
    linear_window: int = opt(64, "window of hedgehog_window and sliding_window, tokens", low=1)
    calibrate_tokens: int = opt(
        2048, "training tokens that set decays, gates and output scales; 0 = off", low=0
    )
    lora_rank: int = opt(8, "rank of the adapters of a stage that trains lora", low=1)
    lora_alpha: float = opt(16.0, "adapters are scaled by alpha / rank", low=0.0)
    lora_dropout: float = opt(0.0, "dropout of the adapters' input", low=0.0, high=0.99)
    lora_targets: str = opt("q,k,v,o", "projections of attention that get adapters")
    transfer: Transfer = field(default_factory=Transfer, metadata={"group": "transfer"})
    search: Search = field(default_factory=Search, metadata={"group": "search"})
    stages: str = opt("align,distill", "stages to run, in order: align, block (--cria), distill, "
                      "long")  # fmt: skip
    cria: int = opt(0, "distil blocks of so many layers alone, from saved inputs, in align and "
                    "block; 0 = off", low=0)  # fmt: skip
    cria_step: str = opt("all", "what of --cria to do in this process",
                         choices=("all", "shard", "collect", "train", "stitch"))  # fmt: skip
    cria_block: int = opt(-1, "train: this block alone; -1 = all that nobody else is at", low=-1)
    cria_resident: int = opt(0, "collect: the teacher's blocks in memory at once, and those "
                             "between that are not distilled; 0 = all", low=0)  # fmt: skip
    share_trunk: str = opt("auto", "one copy of the frozen trunk for teacher and student; "
                           "auto = where no stage trains all, without --student and fsdp",
                           choices=("auto", "false"))  # fmt: skip
    teacher_float8: bool = opt(False, "distill and long: the teacher's matmuls in float8")
    trunk_dtype: str = opt("float32", "of the matrices outside the mixers, their gradients and "
                           "optimizer state", choices=("float32", "bfloat16"))  # fmt: skip
    use_muon: bool = opt(False, "Muon in distill and long")
    align: StageConfig = stage_field("align")
    block: StageConfig = stage_field("block")
    distill: StageConfig = stage_field("distill")
    long: StageConfig = stage_field("long")

    def stage_names(self) -> list[str]:
        """The stages asked for, checked."""
        names = [s.strip() for s in self.stages.split(",") if s.strip()]
        order = [s for s in STAGES if s in names]
        if not names or names != order:
            raise UserError(
                f"--stages: '{self.stages}' found, some of {','.join(STAGES)}, in order, expected"
            )
        if "block" in names and not self.cria:
            raise UserError(f"--stages: {self.stages} found; block is of --cria, which is 0")
        return names


# Other spellings. torchrun's own parser (Python 3.11) trips over --run: it has a --run-path.
ALIASES = {"run_name": "run"}

# Flags of the sister script, with what to use instead.
REFUSED = {
    DistillConfig: {
        "lr": "train_kd.py takes --align_lr and --distill_lr",
        "batch_size": "train_kd.py takes --align_micro_batch and --distill_micro_batch",
        "num_blocks": "train_kd.py takes the student's shape from --teacher or --student",
        "num_heads": "train_kd.py takes the student's shape from --teacher or --student",
        "embedding_dim": "train_kd.py takes the student's shape from --teacher or --student",
    },
    PretrainConfig: {"teacher": "train.py has no teacher; train_kd.py distils"},
}
