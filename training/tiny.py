"""Training of the bundled checkpoint: tokenizer, autoencoder, then transformer, connector and text model together.

Both stages are timed, not counted: the learning rate follows the share of the time that is gone, so a run of H hours
ends after H hours on any machine. A killed run goes on from its last state with the same command.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from step1x.engine.dit import DiT
from step1x.engine.qwen import load_tokenizer
from step1x.engine.text import Conditioner
from step1x.engine.vae import VAE
from step1x.engine.variants import PREFIX_V1
from step1x.engine.weights import load
from step1x.training import autoencoder, state
from step1x.training.conditioning import TextSide
from step1x.training.edits import FAMILIES, Picture, all_wordings, sample, words
from step1x.training.flow import altered, flow_loss, times
from step1x.training.initialisation import init_dit
from step1x.training.pairs import Pairs, Pool, as_tensor
from step1x.training.pictures import Photographs, picture
from step1x.training.recipe import Recipe
from step1x.training.tokenizer import count_template_tokens, small_text_model, train_tokenizer

SAVE_SECONDS = 60.0
WHOLE = 0.8  # a picture the autoencoder learns from has the detail of at least this share of a photograph
LEAST = 0.4  # noise level of samples on the model's own way: their error counts as 1 / level
WINDOWS = 2  # cut from one picture for the autoencoder


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Where, on what and how long."""

    recipe: Recipe
    photos: Path
    folder: Path  # states of the run
    hours: float
    device: torch.device
    seed: int = 0
    init: Path | None = None  # a model folder to start from; its autoencoder is kept as it is

    def __post_init__(self) -> None:
        if not self.hours > 0:
            raise ValueError(f"hours must be above 0, got {self.hours}")


class Clock:
    """Time used by one stage of a run, across restarts, and the learning-rate factor that follows from it."""

    def __init__(self, budget: float, used: float = 0.0) -> None:
        self.budget = budget
        self.start = time.monotonic() - used

    @property
    def used(self) -> float:
        return time.monotonic() - self.start

    @property
    def done(self) -> float:
        return min(1.0, self.used / self.budget)

    def factor(self, step: int, warmup: int) -> float:
        """Linear warm-up over steps, then a cosine to 2 % over the time."""
        return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.done)))


def progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[figure]}"),
        TimeRemainingColumn(),
    )


def random_state(seed: int, steps: int) -> np.random.Generator:
    """Data of a resumed run is drawn from a stream of its own, determined by seed and step."""
    return np.random.default_rng((seed, steps))


def new_text(recipe: Recipe, seed: int) -> TextSide:
    """The random small text model with its tokenizer, and the variant with the cut that fits its template."""
    from transformers import Qwen2VLImageProcessorPil

    torch.manual_seed(seed)
    texts = [PREFIX_V1, "You are a helpful assistant.", "Picture 1: user assistant system", *words(all_wordings())]
    tokenizer = train_tokenizer(texts * 4, recipe.vocabulary)
    variant = recipe.variant.override({"template_tokens": count_template_tokens(tokenizer, recipe.variant.prefix)})
    model = small_text_model(tokenizer, **recipe.text)
    processor = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2)  # the limits are given at each call
    return TextSide(Conditioner(model, tokenizer, processor, variant), tokenizer, variant)


def new_editor(run: Run) -> "Editor":
    """Fresh networks by the recipe, or those of the folder to start from."""
    if run.init is None:
        text = new_text(run.recipe, run.seed)
        dit = DiT(run.recipe.dit, fp32_norms=text.variant.dtype_flow != "pure")
        init_dit(dit, text.variant.reference_ids)
        return Editor(dit, text).to(run.device)
    loaded = load(run.init, device=run.device, dtype=torch.float32)
    tokenizer = load_tokenizer(run.init / "processor")
    editor = Editor(loaded.dit, TextSide(loaded.conditioner, tokenizer, loaded.variant))
    return editor.requires_grad_(True).train()


@torch.no_grad()
def centre_instructions(editor: "Editor", pairs: Pairs) -> None:
    """Make what a batch's instructions differ in, not what they share, the scale of `vector_in`'s input.

    Of a fresh text model's pooled vectors a tenth tells instructions apart; the rest is the template.
    """
    text = editor.text(pairs.patches, pairs.grid, pairs.instructions)
    pooled = editor.dit.prepare(text).text.pooled
    layer = editor.dit.vector_in.in_layer
    layer.weight /= pooled.std(0).square().mean().sqrt()
    layer.bias.copy_(-(layer.weight @ pooled.mean(0)))


def crops(run: Run, photographs: Photographs) -> Iterator[Tensor]:
    """Endless batches of windows of pictures in [-1, 1], a third of them edited.

    Windows must not be small: attention and group norms then learn statistics that a whole picture does not have.

    The pictures are of the sizes that will be edited, and a window is a piece of one: a whole photograph shrunk to a
    window has far more detail in a pixel than the autoencoder will ever be shown.
    """
    random, recipe = np.random.default_rng(run.seed), run.recipe
    while True:
        side, batch = recipe.vae_crops[int(random.integers(len(recipe.vae_crops)))]
        made: list[Picture] = []
        while len(made) < batch:
            canvas = max(side, recipe.vae_canvases[int(random.integers(len(recipe.vae_canvases)))])
            whole = picture(photographs, random, canvas, canvas, recipe.scenes, WHOLE)
            if random.random() < 1 / 3:
                whole = sample(FAMILIES[int(random.integers(len(FAMILIES)))], whole, random).target
            for _ in range(min(WINDOWS, batch - len(made))):
                top, left = random.integers(0, canvas - side + 1, 2)
                made.append(whole[top : top + side, left : left + side])
        yield as_tensor(made).to(run.device)


def train_autoencoder(run: Run, photographs: Photographs) -> VAE:
    """Stage one; returns the averaged, whitened autoencoder in eval mode."""
    torch.manual_seed(run.seed)
    if run.init is not None:
        return load(run.init, device=run.device, dtype=torch.float32).vae
    recipe, path = run.recipe, run.folder / "autoencoder.pt"
    vae = VAE(recipe.vae).to(run.device)
    saved = state.load(path, run.device)
    if saved and saved["finished"]:
        vae.load_state_dict(saved["ema"])
        return vae.eval()
    batches = crops(run, photographs)
    clock = Clock(run.hours * 3600 * recipe.vae_share)
    if not saved:
        autoencoder.start_linear(vae, batches, recipe.chain_steps)
    group = {"params": list(vae.parameters()), "lr": recipe.vae_lr, "base_lr": recipe.vae_lr}
    optimizer = torch.optim.AdamW([group], betas=(0.9, 0.98), weight_decay=0.0)
    average = state.Average(vae, recipe.ema)
    step = 0
    if saved:
        vae.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average.values, average.steps, step = saved["ema"], saved["step"], saved["step"]
        clock = Clock(clock.budget, saved["used"])
    last = time.monotonic()
    with progress() as bar:
        task = bar.add_task("autoencoder", total=1.0, figure="")
        while clock.done < 1:
            set_rate(optimizer, clock.factor(step, 50))
            loss, error = autoencoder.loss(vae, next(batches), 0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(vae.parameters(), 0.5)
            optimizer.step()
            average.update(vae)
            step += 1
            if step % 20 == 0:
                bar.update(task, completed=clock.done, figure=f"{-10 * math.log10(error.item() / 4):.1f} dB")
            if time.monotonic() - last > SAVE_SECONDS:
                last = time.monotonic()
                save_stage(path, vae, optimizer, average, step, clock, finished=False)
    vae.load_state_dict(average.values)
    autoencoder.whiten(vae, [next(batches) for _ in range(16)])
    average.values = state.tensors(vae)
    save_stage(path, vae, optimizer, average, step, clock, finished=True)
    return vae.eval()


def save_stage(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: state.Average,
    step: int,
    clock: Clock,
    *,
    finished: bool,
) -> None:
    values: dict[str, Any] = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "ema": average.values,
        "step": step,
        "used": clock.used,
        "finished": finished,
    }
    state.save(path, values)


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Learning rates as shares of each group's own."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def optimizer_for(editor: "Editor", recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW, with decay on matrices only, and rates of their own for the text model and for the QK norms.

    A head can attend no more sharply than its QK norm's scale lets it, and copying the reference needs sharp heads.
    The scales start at 1 and Adam moves them by one rate a step, so with the common rate they hold all else up.
    """
    scales = [p for name, p in editor.dit.named_parameters() if name.endswith("_norm.scale")]
    held = {id(p) for p in scales}
    groups: list[dict[str, Any]] = [{"params": scales, "lr": recipe.scale_lr, "weight_decay": 0.0}]
    for model, lr in ((editor.dit, recipe.lr), (editor.text_model, recipe.text_lr)):
        for matrices, decay in ((True, recipe.weight_decay), (False, 0.0)):
            chosen = [p for p in model.parameters() if (p.ndim >= 2) == matrices and id(p) not in held]
            groups.append({"params": chosen, "lr": lr, "weight_decay": decay})
    for group in groups:
        group["base_lr"] = group["lr"]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99))


class Editor(nn.Module):
    """What stage two trains: the transformer with its connector, and the text model."""

    def __init__(self, dit: DiT, text: TextSide) -> None:
        super().__init__()
        self.dit = dit
        self.text_model = text.model
        self._text = [text]  # in a list: not a submodule, its weights are text_model's

    @property
    def text(self) -> TextSide:
        return self._text[0]


def train_editor(run: Run, photographs: Photographs, vae: VAE) -> Editor:
    """Stage two; returns the averaged networks in eval mode."""
    recipe, path = run.recipe, run.folder / "editor.pt"
    editor = new_editor(run)
    saved = state.load(path, run.device)
    step = saved["step"] if saved else 0
    random = random_state(run.seed, step)
    generator = torch.Generator().manual_seed(run.seed + step)
    pools = make_pools(recipe, photographs, vae, editor.text.conditioner)
    weights = autoencoder.channel_weights(vae, next(crops(run, photographs)), torch.Generator().manual_seed(run.seed))
    if run.init is None and not saved:
        first = pools[recipe.stages[0].canvases[0]]
        centre_instructions(editor, first.draw(random, min(first.size, 256), 0.1))
    optimizer = optimizer_for(editor, recipe)
    average = state.Average(editor, recipe.ema)
    share = 1.0 if run.init else 1 - recipe.vae_share
    clock = Clock(run.hours * 3600 * share)  # starts here: what comes before is done again by each resumed run
    if saved:
        editor.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average.values, average.steps = saved["ema"], step
        clock = Clock(clock.budget, saved["used"])
    last, smooth = time.monotonic(), 0.0
    with progress() as bar:
        task = bar.add_task("editor", total=1.0, figure="")
        while clock.done < 1:
            set_rate(optimizer, clock.factor(step, 100))
            loss, figure = editor_loss(editor, recipe, pools, weights, clock.done, random, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(editor.parameters(), 1.0)
            optimizer.step()
            average.update(editor)
            step += 1
            smooth = figure.item() if step == 1 else 0.98 * smooth + 0.02 * figure.item()
            if step % 20 == 0:
                bar.update(task, completed=clock.done, figure=f"step {step} loss {smooth:.4f}")
            if time.monotonic() - last > SAVE_SECONDS:
                last = time.monotonic()
                save_stage(path, editor, optimizer, average, step, clock, finished=clock.done >= 1)
    save_stage(path, editor, optimizer, average, step, clock, finished=clock.done >= 1)
    editor.load_state_dict(average.values)
    return editor.eval()


def make_pools(
    recipe: Recipe, photographs: Photographs, vae: VAE, conditioner: Conditioner
) -> dict[tuple[int, int], Pool]:
    canvases = {canvas for stage in recipe.stages for canvas in stage.canvases}
    largest = min(width * height for width, height in canvases)
    return {
        (width, height): Pool(
            photographs,
            vae,
            conditioner,
            (width, height),
            size=max(64, recipe.pool * largest // (width * height)),
            scenes=recipe.scenes,
            weights=recipe.weights,
        )
        for width, height in sorted(canvases)
    }


def editor_loss(
    editor: Editor,
    recipe: Recipe,
    pools: dict[tuple[int, int], Pool],
    weights: Tensor,
    done: float,
    random: np.random.Generator,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """What to descend on one batch of the stage that `done` falls in; and its mean flow loss."""
    passed, stage = 0.0, recipe.stages[-1]
    for candidate in recipe.stages:
        passed += candidate.share
        if done < passed:
            stage = candidate
            break
    canvas = stage.canvases[int(random.integers(len(stage.canvases)))]
    pairs = pools[canvas].draw(random, stage.batch, recipe.refresh)
    instructions = ["" if random.random() < recipe.drop_instruction else words for words in pairs.instructions]
    device = editor.dit.device
    count = len(instructions)
    own, first = int(stage.own * count), int(stage.first * count)
    sigma = times(count, recipe.shift, recipe.spread, generator).to(device)
    sigma[:own].clamp_(min=LEAST)
    sigma[own : own + first] = 1.0
    noise = torch.randn(pairs.target.shape, generator=generator).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        text = editor.text(pairs.patches, pairs.grid, instructions)
        losses = flow_loss(
            editor.dit,
            text,
            (pairs.source, pairs.target),
            editor.text.variant.reference_ids,
            sigma,
            noise,
            weights.repeat_interleave(4) * (1 + stage.emphasis * altered(pairs.source, pairs.target)),
            own,
        )
    descended = (losses + stage.log_floor).log() if stage.log_floor else losses
    return descended.mean(), losses.detach().mean()


def run_training(run: Run) -> tuple[VAE, Editor]:
    """Both stages. Raises ValueError for a folder without photographs."""
    photographs = Photographs(run.photos)
    vae = train_autoencoder(run, photographs)
    return vae, train_editor(run, photographs, vae)
