"""From prompts to updates: the model draws groups of pictures, rewards score them, and what is trained on is each step
of each drawing with its advantage (Flow-GRPO, arXiv 2505.05470).

Everything random about a drawing comes from its prompt's draw and its place in the group, so that a rollout is the same
at every layout. Rewards are worked out on one rank of each replica, and known to all.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.config.rl import FlowGrpoConfig
from megatron_unimm.data.packing import plan_rows, round_up
from megatron_unimm.data.prompts import PromptRow, PromptSample, PromptWork
from megatron_unimm.errors import UserError
from megatron_unimm.flow.guidance import guided_at, num_conditions
from megatron_unimm.flow.guided import FrameState
from megatron_unimm.flow.policy import group_advantages, without_spread
from megatron_unimm.flow.stochastic import StochasticStep, Transition, roll_out, stochastic_steps, trained_steps
from megatron_unimm.flow.timesteps import timestep_grid
from megatron_unimm.generate.frame_painter import Drawable, FrameRequest, Guided
from megatron_unimm.generate.pathway_painter import PathwayPainter, Said
from megatron_unimm.generate.staged import decoding_mode
from megatron_unimm.methods.mmcore.policy.rows import PolicyRow
from megatron_unimm.models.trainable import NOT_IN_TABLE
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform
from megatron_unimm.rewards.registry import build_reward
from megatron_unimm.rewards.reward import RewardPrompt
from megatron_unimm.train.optimizer import gathered_parameters

SHOWN = 16
"""Pictures of a rollout that are kept to be looked at."""


class Reference:
    """The weights that training started from, to be put in place of the model's for a while."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._kept = [
            (parameter, parameter.detach().clone())
            for chunk in chunks
            for name, parameter in chunk.named_parameters()
            if parameter.requires_grad and not name.startswith(NOT_IN_TABLE)
        ]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model is the reference inside."""
        now = [parameter.detach().clone() for parameter, _ in self._kept]
        with torch.no_grad():
            for parameter, value in self._kept:
                parameter.copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for (parameter, _), value in zip(self._kept, now, strict=True):
                    parameter.copy_(value)


@dataclass
class Drawn:
    """One picture of a rollout."""

    prompt: PromptSample
    place: int
    """In its group."""
    drawable: Drawable
    picture: np.ndarray
    words: Tensor | None
    latents: Tensor | None
    clean: Tensor | None
    """Of its conversation, on the first pipeline stage."""
    transitions: list[Transition]
    """Each of this sample alone: ``[1, u, F]``."""
    references: list[Tensor]
    """``[u, F]`` of each transition; empty without a reference."""
    advantage: float = 0.0

    @property
    def name(self) -> tuple[int, int]:
        """The same on every rank."""
        return self.prompt.key, self.place


@dataclass
class Figures:
    """What rollouts were like since the last record."""

    sums: dict[str, float] = field(default_factory=dict)
    rollouts: int = 0
    pictures: list[tuple[str, np.ndarray]] = field(default_factory=list)

    def add(self, values: dict[str, float]) -> None:
        self.rollouts += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def take(self) -> dict[str, float]:
        """Means; counting starts anew."""
        means = {name: value / self.rollouts for name, value in self.sums.items()} if self.rollouts else {}
        self.sums, self.rollouts = {}, 0
        return means


class Rollouts:
    """Makes the rows of updates; called on all ranks.

    Args:
        chunks: this rank's wrapped chunks of the policy.
        reference: None where no divergence is asked for.
    """

    def __init__(
        self,
        stage: StageConfig,
        grpo: FlowGrpoConfig,
        chunks: Sequence[DistributedDataParallel],
        work: PromptWork,
        reference: Reference | None,
        platform: Platform,
        groups: ParallelGroups,
    ) -> None:
        self.stage = stage
        self.grpo = grpo
        self.wrapped = chunks
        self.reference = reference
        self.groups = groups
        modules = [chunk.module for chunk in chunks]
        self.painter = PathwayPainter(modules, stage, groups, platform, work.frames, origin=stage.name)
        self.rewards = build_reward(grpo.rewards, platform.device, "method.grpo.rewards")
        self.figures = Figures()

    def updates(self, rows: Sequence[PromptRow], number: int) -> list[list[PolicyRow]]:
        """This rank's rows of each update that rollout ``number`` is good for.

        Raises:
            UserError: a reward could not be worked out.
        """
        prompts = [sample for row in rows for sample in row.samples if sample.learned]
        steps = self._steps(number)
        with gathered_parameters(self.wrapped):
            drawn = self._draw(prompts, steps)
        everyone = self._score(drawn)
        return [
            self._rows([each for each in drawn if each.name in share])
            for epoch in range(self.grpo.epochs)
            for share in self._shares(sorted(everyone), number, epoch)
        ]

    def _steps(self, number: int) -> list[StochasticStep]:
        sampler = self.grpo.sampler
        uniform = float(_numbers(self.stage.train.seed, number).random())
        trained = trained_steps(self.grpo.trained_steps, sampler.steps, uniform)
        # One grid for pictures of all sizes: a shift by size would make steps of their own.
        grid = timestep_grid(sampler.steps, sampler.shift, 256, sampler.spacing)
        return stochastic_steps(grid.tolist(), self.grpo.noise_level, trained)

    # -- drawing

    def _draw(self, prompts: Sequence[PromptSample], steps: Sequence[StochasticStep]) -> list[Drawn]:
        asked = [(prompt, place) for prompt in prompts for place in range(self.grpo.group_size)]
        by_size: dict[tuple[int, int], list[tuple[PromptSample, int]]] = {}
        for prompt, place in asked:
            by_size.setdefault(prompt.size, []).append((prompt, place))
        drawn: list[Drawn] = []
        at_a_time = 32
        for size, members in sorted(by_size.items()):
            for start in range(0, len(members), at_a_time):
                drawn += self._draw_some(members[start : start + at_a_time], size, steps)
        return drawn

    def _draw_some(
        self, members: Sequence[tuple[PromptSample, int]], size: tuple[int, int], steps: Sequence[StochasticStep]
    ) -> list[Drawn]:
        painter = self.painter
        drawables = [
            painter.lay_out(FrameRequest(prompt.turns, prompt.pictures or (), prompt.size)) for prompt, _ in members
        ]
        shape = drawables[0].tokens, painter.generator.mmdit.patch_dim

        def normal(place: int) -> Tensor:
            parts = [_numbers(prompt.key, own, place).standard_normal(shape, np.float32) for prompt, own in members]
            return torch.from_numpy(np.stack(parts)).to(painter.device)

        with decoding_mode(painter.chunks):
            guided = Guided(painter, drawables, self.grpo.sampler)
            state, transitions = roll_out(guided.velocity, normal(0), steps, lambda place, _: normal(place + 1))
            pictures = painter.pictures(state, size)
            references = self._reference_means(drawables, transitions)
        words, latents, clean = _per_sample(guided, drawables)
        return [
            Drawn(
                prompt=prompt,
                place=place,
                drawable=drawables[i],
                picture=pictures[i],
                words=words[i],
                latents=latents[i],
                clean=clean[i],
                transitions=[
                    Transition(each.step, each.before[i], each.after[i], each.log_prob[i]) for each in transitions
                ],
                references=[each[i] for each in references],
            )
            for i, (prompt, place) in enumerate(members)
        ]

    def _reference_means(self, drawables: Sequence[Drawable], transitions: Sequence[Transition]) -> list[Tensor]:
        if self.reference is None:
            return []
        with self.reference.in_place():
            guided = Guided(self.painter, drawables, self.grpo.sampler)
            return [each.step.mean(each.before, guided.velocity(each.before, each.step.t)) for each in transitions]

    # -- rewards

    def _score(self, drawn: Sequence[Drawn]) -> dict[tuple[int, int], float]:
        """Give every drawing its advantage; returns the rewards of all ranks' drawings by name."""
        groups = self.groups
        answers = groups.tensor_rank == groups.context_rank == groups.pipeline_rank == 0
        mine: dict[tuple[int, int], dict[str, float]] = {}
        error: str | None = None
        if answers:
            try:
                mine = self._values(drawn)
            except UserError as found:
                error = f"{found.where}\0{found.what}"
        everyone: list[tuple[dict[tuple[int, int], dict[str, float]], str | None]] = [
            ({}, None) for _ in range(dist.get_world_size())
        ]
        dist.all_gather_object(everyone, (mine, error), group=groups.host)
        for _, said in everyone:
            if said is not None:
                where, what = said.split("\0", 1)
                raise UserError(where, what)
        values = {name: value for part, _ in everyone for name, value in part.items()}
        totals = {name: value[""] for name, value in values.items()}
        self._advantages(drawn, totals)
        self._note(drawn, values)
        return totals

    def _values(self, drawn: Sequence[Drawn]) -> dict[tuple[int, int], dict[str, float]]:
        """The sum under the empty name, and its parts."""
        prompts = [RewardPrompt(each.prompt.text, each.prompt.metadata, each.prompt.id) for each in drawn]
        found = self.rewards.values([each.picture for each in drawn], prompts)
        return {
            each.name: {"": float(found.total[i])} | {name: float(part[i]) for name, part in found.parts.items()}
            for i, each in enumerate(drawn)
        }

    def _advantages(self, drawn: Sequence[Drawn], totals: dict[tuple[int, int], float]) -> None:
        keys = sorted({key for key, _ in totals})
        table = np.array([[totals[key, place] for place in range(self.grpo.group_size)] for key in keys])
        advantages = group_advantages(table.reshape(len(keys), -1), self.grpo.advantage_std, self.grpo.advantage_clip)
        row_of = {key: row for row, key in enumerate(keys)}
        for each in drawn:
            each.advantage = float(advantages[row_of[each.prompt.key], each.place])

    def _note(self, drawn: Sequence[Drawn], values: dict[tuple[int, int], dict[str, float]]) -> None:
        names = next(iter(values.values())).keys() if values else ()
        means = {name: float(np.mean([value[name] for value in values.values()])) for name in names}
        figures = {f"reward/{name or 'total'}": mean for name, mean in means.items()}
        keys = sorted({key for key, _ in values})
        table = np.array([[values[key, place][""] for place in range(self.grpo.group_size)] for key in keys])
        figures["reward/std_in_group"] = float(table.std(axis=1).mean())
        figures["reward/share_without_spread"] = float(without_spread(table).mean())
        self.figures.add(figures)
        if dist.get_rank() == 0:
            self.figures.pictures = [
                (f"{values[each.name]['']:.2f}  {each.prompt.text}", each.picture) for each in drawn[:SHOWN]
            ]

    # -- updates

    def _shares(self, names: Sequence[tuple[int, int]], number: int, epoch: int) -> list[set[tuple[int, int]]]:
        """Drawings of each update of a pass, the same on all ranks."""
        seed = self.stage.train.seed

        def order(name: tuple[int, int]) -> bytes:
            return hashlib.blake2b(repr((seed, number, epoch, name)).encode(), digest_size=16).digest()

        shuffled = sorted(names, key=order)
        count = self.grpo.num_updates
        return [set(shuffled[update::count]) for update in range(count)]

    def _rows(self, drawn: Sequence[Drawn]) -> list[PolicyRow]:
        """Every step of these drawings, in as few rows as they need; as many on every rank."""
        pairs = [(each, place) for each in drawn for place in range(len(each.transitions))]
        times = num_conditions(self.grpo.sampler)
        by_size: dict[int, list[tuple[Drawn, int]]] = {}
        for pair in pairs:
            by_size.setdefault(pair[0].drawable.tokens, []).append(pair)
        rows: list[PolicyRow] = []
        for _, members in sorted(by_size.items()):
            lengths = [times * len(each.drawable.sample) for each, _ in members]
            plan = plan_rows(
                lengths,
                costs=[float(length) for length in lengths],
                sequence_length=self.painter.work.room,
                num_rows_multiple=1,
                alignment=1,
                packing=True,
            )
            rows += [self._row([members[i] for i in chosen], times) for chosen in plan]
        parallel = self.stage.system.parallel
        wanted = torch.tensor(max(1, len(rows)))
        dist.all_reduce(wanted, dist.ReduceOp.MAX, group=self.groups.host)
        multiple = parallel.pipeline if parallel.virtual_pipeline > 1 else 1
        rows += [self._row([], times) for _ in range(round_up(int(wanted), multiple) - len(rows))]
        return rows

    def _row(self, pairs: Sequence[tuple[Drawn, int]], times: int) -> PolicyRow:
        painter, work = self.painter, self.painter.work
        device, width = painter.device, painter.generator.mmdit.patch_dim
        one = work.row([each.drawable.sample for each, _ in pairs])
        frames = one.frames.tiled(times)
        steps = [each.transitions[place].step for each, place in pairs]
        by_frame = np.where(one.frames.is_clean, 0.0, np.array([step.t for step in steps])[one.frames.sample])
        before = _stacked([each.transitions[place].before for each, place in pairs], width, device)
        noisy = np.flatnonzero(np.repeat(~one.frames.is_clean, one.frames.counts))
        num_text = round_up(int(frames.num_condition.sum()), work.stream_multiple)
        num_words = len(one.text_kept)
        words = latents = clean = None
        if painter.first is not None:
            hidden, size = self.stage.model.backbone.hidden_size, painter.queries.latent_size(self.stage.model)
            words = _joined([each.words for each, _ in pairs], hidden, painter).repeat(times, 1)
            latents = _joined([each.latents for each, _ in pairs], size, painter).repeat(times, 1)
            clean = _joined([each.clean for each, _ in pairs], width, painter)
        state = FrameState.build(one.frames, clean, width, device).at(before.flatten(0, 1))
        references = [each.references[place] for each, place in pairs if each.references]
        copies = np.arange(times)
        return PolicyRow(
            num_text=num_text,
            num_tokens=self.stage.data.sequence_length,
            frames=frames,
            timestep=np.tile(by_frame, times),
            state=state.repeat(times, 1),
            words=words,
            latents=latents,
            condition_order=_tiled_order(one.condition_order, num_words, len(one.visual_kept), times),
            text_kept=np.repeat(copies == 0, num_words),
            visual_kept=np.repeat((copies < 2) & work.draws_from("visual"), len(one.visual_kept)),
            places=noisy[None] + copies[:, None] * int(one.frames.counts.sum()),
            guided=np.array([guided_at(step.t, self.grpo.sampler.guidance_interval) for step in steps], dtype=bool),
            before=before,
            after=_stacked([each.transitions[place].after for each, place in pairs], width, device),
            reference=_stacked(references, width, device) if self.reference is not None else None,
            keep=np.array([step.keep for step in steps]),
            pull=np.array([step.pull for step in steps]),
            std=np.array([step.std for step in steps]),
            kl_std=np.array([step.std if self.grpo.kl_per == "step" else step.diffusion for step in steps]),
            old_log_prob=torch.stack([each.transitions[place].log_prob for each, place in pairs])
            if pairs
            else torch.zeros(0, device=device),
            advantage=np.array([each.advantage for each, _ in pairs]),
        )


def _per_sample(
    guided: Guided, drawables: Sequence[Drawable]
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None], Sequence[Tensor | None]]:
    """Words, visual latents and clean latents of each conversation, where the first stage has them."""
    if guided.said is None or guided.clean is None:
        none = [None] * len(drawables)
        return none, none, none
    said: Said = guided.said
    words = said.words.split([each.num_words for each in drawables])
    latents = said.latents.split([each.num_latents for each in drawables])
    clean = guided.clean.split([int(each.sample.sizes[:-1].prod(axis=1).sum()) for each in drawables])
    return words, latents, clean


def _tiled_order(order: np.ndarray, num_words: int, num_latents: int, times: int) -> np.ndarray:
    """Of copies one behind the other, whose words all stand before their latents."""
    is_word = order < num_words
    copies = [
        np.where(is_word, order + copy * num_words, order + (times - 1) * num_words + copy * num_latents)
        for copy in range(times)
    ]
    return np.concatenate(copies)


def _stacked(parts: Sequence[Tensor], width: int, device: torch.device) -> Tensor:
    return torch.stack(list(parts)).float() if parts else torch.zeros(0, 0, width, device=device)


def _joined(parts: Sequence[Tensor | None], width: int, painter: PathwayPainter) -> Tensor:
    nothing = torch.zeros(0, width, dtype=painter.dtype, device=painter.device)
    return torch.cat([nothing, *(part for part in parts if part is not None)])


def _numbers(*words: int) -> np.random.Generator:
    """Random numbers that belong to these words."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
