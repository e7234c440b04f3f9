"""Engine: load a model once, edit many pictures with it. The stages of an edit in order, and nothing else."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from step1x.engine import image as pictures
from step1x.engine.calibration import (
    Constants,
    Setting,
    Trajectory,
    calibration_of,
    constants_for,
    published,
    trajectory,
)
from step1x.engine.denoise import Guidance, Loop, branches, denoise
from step1x.engine.embeddings import CachedConditioner, EmbeddingCache
from step1x.engine.errors import InputError
from step1x.engine.executor import DEFAULT, Execution, captures, is_hollow, prepared, stepper
from step1x.engine.health import first_lost, is_flat
from step1x.engine.image import Canvas
from step1x.engine.loading import LOADING, components_for, fitting, home_of, wanted_profile
from step1x.engine.mask import open_mask
from step1x.engine.picture import Picture, Source, open_picture
from step1x.engine.policy import Dense
from step1x.engine.presets import masked, presets
from step1x.engine.progress import Progress
from step1x.engine.request import (
    Defaults,
    Edit,
    Noise,
    Options,
    Posterior,
    Request,
    Sampled,
    canvas_of,
    checked_seed,
    chosen,
)
from step1x.engine.residency import RESIDENT, Home, current, given_back, limit
from step1x.engine.schedule import timesteps
from step1x.engine.selection import token_mask
from step1x.engine.skipping import Done, Skipping, by_mask, by_similarity, skip, watched
from step1x.engine.timing import OnStep, Recorder
from step1x.engine.variants import NEGATIVE_T2I
from step1x.engine.weights import Components
from step1x.profiles import Residency
from step1x.quant.linear import dynamic, exactly

if TYPE_CHECKING:
    from step1x.engine.text import Conditioner, Conditioning

log = logging.getLogger(__name__)

# What is done, in this order, when GPU memory runs out: what costs least time first, nothing that changes the result
# by more than rounding.
EASINGS = (
    "autoencoder in strips",
    "steps without CUDA graphs",
    "text model evicted",
    "keys and values in 8 bits",
    "guidance one by one",
    "blocks streamed",
)
STREAMED = 24  # of the transformer's 57 blocks, when nothing else helped: 6.5 of its 17.3 GB in bfloat16


class Engine:
    """A loaded model. Calls share nothing but its weights, so threads may use one engine or several at a time."""

    def __init__(
        self,
        components: Components,
        execution: Execution = DEFAULT,
        cache: EmbeddingCache | None = None,
        residency: Residency = RESIDENT,
        defaults: Defaults | None = None,
        constants: Constants | None = None,
        say: Callable[[str], None] = log.info,
    ) -> None:
        """cache: of embeddings (engine/embeddings.py). residency: of the weights (engine/residency.py).

        defaults: how an edit is made whose options do not say. constants: what speeds plan by (engine/calibration.py);
        None: those published. say: told if they are for another setting.
        """
        self.variant = components.variant
        self.dit = components.dit
        self.vae = components.vae
        self.conditioner: Conditioner | CachedConditioner = components.conditioner
        if cache is not None and components.text_digest:
            self.conditioner = CachedConditioner(components.conditioner, cache, components.text_digest)
        self.name = components.name
        self.digest = components.digest
        self._home = Home(components, residency, components.dit.device)
        self._components = components
        self._execution = execution
        self._graphs = True  # steps may be captured
        self._defaults = defaults or Defaults()
        norms, self._fitted_to = constants or published(self.variant)
        self._presets, self._masked = presets(norms), masked(norms)
        self._say: Callable[[str], None] | None = say  # None: what is to be said was
        with current(self.device):
            self._runner = prepared(components, execution)
        self._exported = components.exported is not None
        self._coarse = bool(execution.fp8_attention or execution.attention == "fp8" or dynamic(components.dit))

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        *,
        profile: str | Path | None = None,
        variant: str | None = None,
        fix_quotes: bool = False,
        cache: EmbeddingCache | bool = True,
        calibration: str | Path | None = None,
        say: Callable[[str], None] = log.info,
        progress: Progress | None = None,
        **settings: object,
    ) -> Self:
        """Load a model once, for many edits.

        model: a folder in the official or the diffusers layout or that of an engine, a Hub id, or None for the bundled
        one. profile: where and how precisely, by name or .toml file, or "auto" for the most faithful that is fast on
        the card (default: the engine's own, else auto). If it quantises, or an engine was built for it, an
        engine is loaded, and built first if it must be (engine/build.py), which `say` and `progress` are told. variant:
        a parity preset such as "official-v1.1" (default: the weights' own). fix_quotes: keep an apostrophe or a lone
        quote from opening a quotation, which the released programs let it do, to the instruction's harm (§1.4). cache:
        of embeddings; True is the user's own, on disk (engine/embeddings.py). calibration: what speeds other than exact
        plan by, a file of `step1x-engine calibrate` (default: calibration.json of the model's folder, if it is for the
        variant's guidance rule, else what is published); `say` is told, once, of an edit that it was not fitted to.
        settings: what differs from the profile, of device, dtype (a torch one) and the fields of `Execution`; and
        trust_engine, True to run what was exported to a folder outside the user's cache (engine/backends.py).
        Raises InputError for anything wrong with the arguments or the files.
        """
        trusted = settings.pop("trust_engine", False) is True
        found = calibration_of(model, calibration)  # before the weights: a bad file is told at once
        wanted = wanted_profile(profile, settings, model)
        home, residency = home_of(wanted)
        kept = (EmbeddingCache() if cache else None) if isinstance(cache, bool) else cache
        with current(home), fitting(model, wanted):
            limit(wanted.budget_gb, home)
            components = components_for(
                model,
                wanted,
                variant=variant,
                fix_quotes=fix_quotes,
                say=say,
                progress=progress,
                trust_engine=trusted,
            )
            constants = constants_for(components.variant, found, calibration)
            return cls(components, Execution.of(wanted), kept, residency, Defaults.of(wanted), constants, say)

    @property
    def device(self) -> torch.device:
        return self.dit.device

    def compile(self) -> None:
        """Compiles the steps from here on, for many edits: the next of each size is slow, those after it are fast.

        As `compiled=True` of `load`. What was exported runs as it is.
        """
        if self._exported or self._execution.compiled:
            return
        strips, self._execution = self.vae.strip_pixels, replace(self._execution, compiled=True)
        with current(self.device):
            self._runner = prepared(self._components, self._execution)
        self.vae.strip_pixels = strips  # which running out of memory may have changed

    def edit(
        self,
        source: Source,
        instruction: str,
        *,
        seed: int | None = None,
        on_step: OnStep | None = None,
        on_stage: Callable[[str], None] | None = None,
        **options: object,
    ) -> Edit:
        """Change a picture as the instruction says.

        source: a path, the bytes of a file, a binary stream or a PIL image. Keyword options are the fields of
        `Options`: negative_prompt, steps, guidance, size, strength, posterior, branches, exact_algebra, speed, mask,
        policy. seed None draws a fresh one.
        on_step(step, steps) is called after each denoise step, on_stage(name) as each stage begins.
        The result has the source's size. Raises InputError for bad input.
        """
        return self.edit_batch([source], [instruction], seeds=[seed], on_step=on_step, on_stage=on_stage, **options)[0]

    def edit_batch(
        self,
        sources: Sequence[Source],
        instructions: Sequence[str],
        *,
        seeds: Sequence[int | None] | None = None,
        on_step: OnStep | None = None,
        on_stage: Callable[[str], None] | None = None,
        **options: object,
    ) -> list[Edit]:
        """`edit` for several (picture, instruction) pairs in one batch; all must come out at one canvas size.

        Equal to single edits up to rounding. Variants without text padding (v1.2) run the pairs one by one.
        """
        wanted = chosen(Options, options)
        drawn = [checked_seed(seed) for seed in (seeds or [None] * len(sources))]
        if not sources or not len(sources) == len(instructions) == len(drawn):
            raise InputError(
                f"need as many sources as instructions and seeds, at least one: got {len(sources)} sources, "
                f"{len(instructions)} instructions, {len(drawn)} seeds"
            )
        if not self.variant.pad_text and len(sources) > 1:
            return [
                self.edit(source, words, seed=seed, on_step=on_step, on_stage=on_stage, **options)
                for source, words, seed in zip(sources, instructions, drawn, strict=True)
            ]
        with current(self.device):
            return self._edited(sources, instructions, drawn, wanted, Recorder(self.device, on_stage), on_step)

    def _edited(
        self,
        sources: Sequence[Source],
        instructions: Sequence[str],
        drawn: list[int],
        wanted: Options,
        recorder: Recorder,
        on_step: OnStep | None,
    ) -> list[Edit]:
        """`edit_batch` behind its checks. drawn: the seeds."""
        with recorder.stage("preprocess"):
            opened = [open_picture(source) for source in sources]
            marked = None if wanted.mask is None else [open_mask(wanted.mask, one) for one in opened]
            canvas = self._canvas(opened, wanted.size)
        request = Request(
            opened=opened,
            instructions=list(instructions),
            seeds=drawn,
            canvas=canvas,
            recorder=recorder,
            on_step=on_step,
            marked=marked,
        )
        made = self._fitted(request, wanted)
        with recorder.stage("postprocess"):
            truncate = self.variant.truncate_output
            images = [request.finished(index, pixels, truncate) for index, pixels in enumerate(made.pixels)]
        facts = [self._metadata(words, seed, wanted) for words, seed in zip(instructions, drawn, strict=True)]
        return [
            Edit(image, seed, recorder.seconds, recorder.steps, fact | made.notes)
            for image, seed, fact in zip(images, drawn, facts, strict=True)
        ]

    @torch.no_grad()
    def trajectory(self, source: Source, instruction: str, *, seed: int, **options: object) -> Trajectory:
        """What a dense edit shows of the model, for `step1x-engine calibrate`; the picture itself is not finished.

        Arguments as those of `edit`. Raises InputError for bad input.
        """
        wanted = chosen(Options, options)
        opened = [open_picture(source)]
        canvas, recorder = self._canvas(opened, wanted.size), Recorder(self.device)
        request = Request(
            opened=opened,
            instructions=[instruction],
            seeds=[checked_seed(seed)],
            canvas=canvas,
            recorder=recorder,
            on_step=None,
        )
        with current(self.device), self._home.denoising():
            loop, (latents, reference) = self._prepare(request, wanted)
            assert reference is not None
            steps = watched(self.dit, loop, (latents, reference), canvas.grid)
            return trajectory(steps, loop.schedule.tolist())

    def generate(
        self,
        prompt: str,
        *,
        width: int = 1024,
        height: int = 1024,
        seed: int | None = None,
        on_step: OnStep | None = None,
        **options: object,
    ) -> Edit:
        """Text to image (v1.1 and later, §1.8); sides are multiples of 16.

        The negative prompt defaults to the released one. Raises InputError for v1.0 weights and bad sizes.
        """
        if self.variant.version == "v1.0":
            raise InputError("text to image needs a v1.1 or later model; this one is v1.0")
        wanted = chosen(Options, {"negative_prompt": NEGATIVE_T2I, **options})
        drawn = checked_seed(seed)
        if wanted.mask is not None:
            raise InputError("text to image has no picture that a mask could mark")
        with current(self.device):
            recorder = Recorder(self.device)
            request = Request(
                opened=None,
                instructions=[prompt],
                seeds=[drawn],
                canvas=Canvas(width, height),
                recorder=recorder,
                on_step=on_step,
            )
            made = self._fitted(request, wanted)
            with recorder.stage("postprocess"):
                image = pictures.to_image(made.pixels[0], self.variant.truncate_output)
        return Edit(image, drawn, recorder.seconds, recorder.steps, self._metadata(prompt, drawn, wanted) | made.notes)

    def _canvas(self, opened: Sequence[Picture], size: int | None) -> Canvas:
        return canvas_of(opened, self.variant.size if size is None else size)

    def _fitted(self, request: Request, options: Options) -> Sampled:
        """`_sample`, and again by each of EASINGS that is left, until it fits GPU memory; metadata names those taken.

        Size and precision stay what they are. Raises InputError if it does not fit after all.
        """
        taken: list[str] = []
        left = list(EASINGS)
        while True:
            try:
                made = self._sample(request, options)
                return replace(made, notes=made.notes | {"out_of_memory": ", ".join(taken)}) if taken else made
            except torch.OutOfMemoryError:
                pass  # what it holds is freed with it
            given_back(self.device)
            easier = None
            while left and easier is None:
                name = left.pop(0)
                easier = self._eased(name, request, options)
            if easier is None:
                also = f", also after: {', '.join(taken)}" if taken else ""
                raise InputError(
                    f"out of GPU memory at {request.canvas.width} x {request.canvas.height}{also}; "
                    "take a smaller size, or a profile with a smaller budget"
                )
            taken.append(name)
            options = easier

    def _eased(self, name: str, request: Request, options: Options) -> Options | None:
        """Takes one of EASINGS, for good where weights move; None: it was so already."""
        if name == "autoencoder in strips" and not self.vae.in_strips(request.canvas.width * request.canvas.height):
            self.vae.strip_pixels = 0
            return options
        if name == "steps without CUDA graphs" and captures(self.dit, self._execution) and self._graphs:
            self._graphs = False
            self._runner = stepper(self.dit, self._execution, graphs=False)  # their memory goes with them
            return options
        if name == "text model evicted" and self._home.is_resident("text"):
            for part in ("text", "vision"):
                if self._home.is_resident(part):
                    self._home.keep(part, "evict")
            return options
        wide = not self._defaults.eight_bit_keys
        if name == "keys and values in 8 bits" and wide and self._skipping(request, options):
            self._defaults = replace(self._defaults, eight_bit_keys=True)
            return options
        if name == "guidance one by one" and self._batches(options):
            return replace(options, branches="sequential")
        if name == "blocks streamed" and not (self._home.streams_dit or self._exported):
            self._home.stream_dit(STREAMED)
            self._runner = stepper(self.dit, self._execution, graphs=False)
            return options
        return None

    @torch.no_grad()
    def _sample(self, request: Request, options: Options) -> Sampled:
        """The edited pictures."""
        loop, state = self._prepare(request, options)
        skipping = None if state[1] is None else self._skipping(request, options)
        trail: list[Tensor] | None = [] if self._coarse else None  # latents after each step
        made = self._run(request, loop, state, skipping, trail)
        if trail is None:
            return made
        lost = first_lost(trail)
        if lost is None and not is_flat(made.pixels):
            return made
        first, steps = lost or 0, len(trail)
        if skipping is not None:
            first = 0  # what was kept of earlier steps may be lost as well
        why = "a picture of one colour" if lost is None else "a number out of range"
        if is_hollow(self.dit):
            raise InputError(f"8-bit arithmetic made {why}, and this engine has no other; use --backend torch")
        with exactly(self.dit):
            again = (trail[first - 1] if first else state[0], state[1])
            made = self._run(request, loop.exactly(self.dit, first), again)
        return replace(made, notes={"rerun": f"steps {first + 1} to {steps} without 8-bit arithmetic: it made {why}"})

    def _prepare(self, request: Request, options: Options) -> tuple[Loop, tuple[Tensor, Tensor | None]]:
        """The loop of a request, and the tokens that it starts from: noisy ones, and the reference's."""
        opened, canvas, recorder = request.opened, request.canvas, request.recorder
        steps = self.variant.steps if options.steps is None else options.steps
        scale = self.variant.guidance if options.guidance is None else options.guidance
        guided = scale > 1
        noise = [Noise.draw(seed, canvas, self.vae.config.z_channels) for seed in request.seeds]
        with recorder.stage("encode_text"):
            negative = options.negative_prompt if guided else None
            groups = self._conditionings(request, negative, options.algebra.share)
        with recorder.stage("encode_image"):
            latents = None if opened is None else self._encode(opened, canvas, noise, options.posterior)
        with recorder.stage("prepare"):
            state = torch.cat([one.latents for one in noise]).to(self.device, self.dit.dtype)
            schedule = timesteps(steps, canvas.tokens, options.strength if latents is not None else None)
            if options.strength is not None and latents is not None:
                state = schedule[0].item() * state + (1 - schedule[0].item()) * latents
            ids = pictures.image_ids(canvas.grid, None if latents is None else self.variant.reference_ids)
            if self._exported and not (options.algebra.fuse and options.algebra.prune):
                raise InputError("exported engines have the exact algebra built in; use --backend torch without it")
            runner = self._runner if options.algebra.fuse else None
            forwards = branches(self.dit, groups, ids, self._batches(options), options.algebra, runner)
            guidance = Guidance(scale, self.variant.rescale_above) if guided else None
            loop = Loop(forwards, schedule, guidance, self.variant, options.algebra)
        return loop, (pictures.pack(state), None if latents is None else pictures.pack(latents))

    def _batches(self, options: Options) -> bool:
        """Whether both forwards of guidance run at once."""
        wanted = options.branches or self._defaults.branches
        return self.variant.batched_guidance if wanted is None else wanted == "batched"

    def _skipping(self, request: Request, options: Options) -> Skipping | None:
        """What a request leaves out; None: nothing. Raises InputError where that needs the fused operations."""
        speed = options.speed or self._defaults.speed
        policy = options.policy or (self._presets if request.marked is None else self._masked)[speed]
        if isinstance(policy, Dense):
            return None
        if options.policy is None and speed != "exact":
            self._compare(options)
        if not options.algebra.fuse:
            raise InputError("steps and regions are left out by the exact algebra's operations; leave it on")
        grid = request.canvas.grid
        select = by_similarity(grid)
        if request.marked is not None:
            masks = [token_mask(torch.from_numpy(one)[None], grid) for one in request.marked]
            select = by_mask(torch.cat(masks), grid)
        return Skipping(policy=policy, select=select, eight_bit=self._defaults.eight_bit_keys)

    def _compare(self, options: Options) -> None:
        """Says, once, if the constants that speeds plan by were fitted to another setting than this edit's."""
        scale = self.variant.guidance if options.guidance is None else options.guidance
        apart = self._fitted_to.apart(Setting.of(self.variant, scale, self.digest))
        if apart and self._say is not None:
            say, self._say = self._say, None
            say(f"speed goes by constants {apart}; `step1x-engine calibrate` fits them")

    def _run(
        self,
        request: Request,
        loop: Loop,
        state: tuple[Tensor, Tensor | None],
        skipping: Skipping | None = None,
        trail: list[Tensor] | None = None,
    ) -> Sampled:
        """Pictures of the tokens at the end of the loop."""
        tokens, done = self._denoised(request, loop, state, skipping, trail)
        with request.recorder.stage("decode"):
            pixels = self._decoded(tokens, request.canvas)
        return Sampled(pixels, {} if done is None else done.notes)

    @torch.no_grad()
    def _denoised(
        self,
        request: Request,
        loop: Loop,
        state: tuple[Tensor, Tensor | None],
        skipping: Skipping | None,
        trail: list[Tensor] | None = None,
    ) -> tuple[Tensor, Done | None]:
        """The tokens at the end of the loop, and what was left out."""
        recorder, reference = request.recorder, state[1]
        listening = recorder.listening(request.on_step)
        with recorder.stage("denoise"), self._home.denoising():
            recorder.step()
            if skipping is None or reference is None:
                return denoise(self.dit, loop, state, listening, trail), None
            done = skip(self.dit, loop, (state[0], reference), skipping, listening, trail)
            return done.latents, done

    @torch.no_grad()
    def _decoded(self, tokens: Tensor, canvas: Canvas) -> Tensor:
        """Pictures (batch, 3, height, width), nominally in [-1, 1]."""
        with self._home.using("vae"):
            return self.vae.decode(pictures.unpack(tokens, canvas.grid).float())

    def _conditionings(self, request: Request, negative: str | None, share: bool) -> "list[list[Conditioning]]":
        """Encoded instructions, and after them the negative prompts unless `negative` is None."""
        groups: list[list[Conditioning]] = [[] for _ in range(1 if negative is None else 2)]
        for index, words in enumerate(request.instructions):
            shown = None
            if request.opened is not None:
                shown = pictures.resized(request.opened[index].rgb, request.canvas, self.variant.resize)
            prompts = [words] if negative is None else [words, negative]
            for group, one in zip(groups, self.conditioner.encode(shown, prompts, share=share), strict=True):
                group.append(one)
        return groups

    def _encode(
        self, opened: Sequence[Picture], canvas: Canvas, noise: Sequence[Noise], posterior: Posterior
    ) -> Tensor:
        """Reference latents (batch, 16, rows, columns) in the transformer's dtype."""
        pixels = torch.cat([pictures.pixels(picture.rgb, canvas, self.variant.resize) for picture in opened])
        drawn = torch.cat([one.posterior for one in noise]).to(self.device) if posterior == "sample" else None
        with self._home.using("vae"):
            latents = self.vae.encode(pixels.to(self.device), drawn, clamp_logvar=self.variant.clamp_logvar)
        return latents.to(self.dit.dtype)

    def _metadata(self, instruction: str, seed: int, options: Options) -> dict[str, str | int | float]:
        model: dict[str, str | int | float] = {"model": self.name, "model_digest": self.digest}
        return {"instruction": instruction, "seed": seed, **options.facts(self.variant), **model}


def edit(source: Source, instruction: str, *, model: str | Path | None = None, **options: Any) -> Edit:
    """Load a model (default: the bundled one) and edit one picture.

    Options: those of `Engine.load` and those of `Engine.edit`.
    Whoever edits more than one picture keeps an `Engine`.
    """
    loading = {name: options.pop(name) for name in LOADING if name in options}
    return Engine.load(model, **loading).edit(source, instruction, **options)
