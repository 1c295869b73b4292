"""The target talks: from seeds to whole conversations, as token ids."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_stairs.distill.errors import DistillError
from vllm_stairs.distill.generators import Generator, Request
from vllm_stairs.distill.prompts import Seed, Turn

GIVEN, SAMPLED, GREEDY = 0, 1, 2
"""Where a token came from: it was given, or the writer drew it, or it was the writer's best."""

SHORTEST_REQUEST = 3
"""A user's text with fewer written tokens is dropped: the target had nothing to ask."""
FEWEST_DISTINCT = 0.25
"""A user's text with a smaller share of distinct tokens is a loop, and is dropped."""


@dataclass(frozen=True)
class Wording:
    """What stands between the speakers, as token ids."""

    before_user: tuple[int, ...]
    """From the start of the text to the first user's words."""
    before_answer: tuple[int, ...]
    """From the end of the user's words to the answer's first."""
    before_next_user: tuple[int, ...]
    """From the end of an answer to the user's next words; an end-of-text token comes first."""

    @classmethod
    def of(cls, tokenizer: Any) -> "Wording":
        """Read it off the chat template; without one, nothing stands between them.

        Raises:
            DistillError: the template does not show the texts that it is given.
        """

        def ids(text: str) -> tuple[int, ...]:
            return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

        beginning = tuple(tokenizer("")["input_ids"]) or (tokenizer.bos_token_id,)
        if beginning == (None,):  # Something must stand before the first token.
            beginning = ids("\n")
        if not tokenizer.chat_template:
            return cls(beginning, (), ids("\n"))
        marks = ["USERSAYSONE", "ANSWERSAYSTWO", "USERSAYSTHREE"]
        roles = ["user", "assistant", "user"]
        try:
            text = tokenizer.apply_chat_template(
                [{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)],
                tokenize=False,
                add_generation_prompt=True,
            )
            before, rest = text.split(marks[0])
            to_answer, rest = rest.split(marks[1])
            to_user, _ = rest.split(marks[2])
        except Exception as error:
            raise DistillError(
                "the chat template of the target does not show a plain conversation "
                f"({type(error).__name__}): only templates that show every text as it is will do"
            ) from None
        return cls(ids(before) or beginning, ids(to_answer), ids(to_user))


@dataclass
class Talk:
    """A conversation while it is written."""

    seed: Seed
    greedy: bool
    past_the_end: bool
    temperature: float
    tokens: list[int] = field(default_factory=list)
    origin: list[int] = field(default_factory=list)
    """Of each token: :data:`GIVEN`, :data:`SAMPLED` or :data:`GREEDY`."""
    user_text: list[int] = field(default_factory=list)
    """What the user said last."""
    end: int | None = None
    """The end-of-text token of the last answer, if it came to its end."""
    answered: int = 0
    """Tokens up to the last word of the last answer."""
    over: bool = False

    def add(self, tokens: Sequence[int], origin: int) -> None:
        """Append tokens of one origin."""
        self.tokens += tokens
        self.origin += [origin] * len(tokens)

    def break_off(self) -> None:
        """Take back what came after the last answer: nothing follows it."""
        del self.tokens[self.answered :], self.origin[self.answered :]
        self.over = True


@dataclass(frozen=True)
class Manner:
    """How the answers are written."""

    answer_tokens: int = 192
    greedy_share: float = 0.75
    past_the_end_share: float = 0.1
    """Share of the conversations whose answers go on after their end: what a client sees that
    asks for a number of tokens."""
    temperatures: tuple[float, ...] = (0.5, 0.9)
    """Of the answers that are not greedy."""
    user_temperature: float = 0.8
    """Of the users' words: varied, but not noise."""
    max_length: int = 1024
    """Tokens of a whole conversation; what would be longer ends there."""


def converse(
    seeds: Sequence[Seed],
    generator: Generator,
    tokenizer: Any,
    manner: Manner,
    *,
    may_use: Callable[[str], bool],
    seed: int = 0,
) -> list[Talk]:
    """Let the target write the seeds' conversations, turn by turn, all of them in batches.

    Args:
        seeds: what the users begin with.
        generator: writes; the target itself, or the draft in an on-policy round.
        tokenizer: the target's.
        manner: how the answers are written.
        may_use: whether a user's text may be trained on.
        seed: of all that is drawn.

    Returns:
        The conversations that were not dropped.
    """
    wording = Wording.of(tokenizer)
    talks = [_begin(s, manner, seed) for s in seeds]
    for turn in range(max(len(s.turns) for s in seeds)):
        speaking = [t for t in talks if turn < len(t.seed.turns) and _may_go_on(t, turn, manner)]
        _let_users_speak(speaking, turn, generator, tokenizer, wording, manner, seed)
        for talk in speaking:
            if not talk.user_text or not may_use(tokenizer.decode(talk.user_text)):
                talk.break_off()
        _let_target_answer([t for t in speaking if not t.over], generator, wording, manner, seed)
    talks = [t for t in talks if any(t.origin)]
    for talk in talks:
        _finish(talk)
    return talks


def _begin(seed: Seed, manner: Manner, number: int) -> Talk:
    draw = random.Random(f"{number}/{seed.id}/manner")
    greedy = draw.random() < manner.greedy_share
    return Talk(
        seed,
        greedy=greedy,
        past_the_end=draw.random() < manner.past_the_end_share,
        temperature=0.0 if greedy else draw.choice(manner.temperatures),
    )


def _may_go_on(talk: Talk, turn: int, manner: Manner) -> bool:
    return not talk.over and (turn == 0 or talk.end is not None)


def _let_users_speak(
    talks: Sequence[Talk],
    turn: int,
    generator: Generator,
    tokenizer: Any,
    wording: Wording,
    manner: Manner,
    seed: int,
) -> None:
    """Append what the users say; a text that is no request breaks its conversation off."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    requests, writers = [], []
    for talk in talks:
        said: Turn = talk.seed.turns[turn]
        opening = ids(said.opening)
        before = list(wording.before_next_user if turn else wording.before_user)
        origin = GREEDY if talk.greedy else SAMPLED
        if turn and before[:1] == [talk.end]:  # The end of the answer: the target wrote it.
            talk.add(before[:1], origin)
            before = before[1:]
        talk.add([*before, *opening], GIVEN)
        talk.user_text = opening
        room = manner.max_length - len(talk.tokens) - 64
        if said.write_at_most and room > 0:
            at_most = min(said.write_at_most, room)
            requests.append(_request(talk, at_most, manner.user_temperature, False, seed))
            writers.append(talk)
    for talk, written in zip(writers, generator.write(requests), strict=True):
        words = written.tokens
        if len(words) < SHORTEST_REQUEST or len(set(words)) < FEWEST_DISTINCT * len(words):
            talk.user_text = []
            continue
        talk.add(words, SAMPLED)
        talk.user_text = [*talk.user_text, *words]
    for talk in talks:
        if talk.user_text:
            closing = ids(talk.seed.turns[turn].closing)
            talk.add(closing, GIVEN)
            talk.user_text = [*talk.user_text, *closing]


def _let_target_answer(
    talks: Sequence[Talk], generator: Generator, wording: Wording, manner: Manner, seed: int
) -> None:
    requests, writers = [], []
    for talk in talks:
        talk.add(wording.before_answer, GIVEN)
        room = manner.max_length - len(talk.tokens)
        if room <= 0:
            talk.break_off()
            continue
        at_most = min(manner.answer_tokens, room)
        requests.append(_request(talk, at_most, talk.temperature, talk.past_the_end, seed))
        writers.append(talk)
    for talk, written in zip(writers, generator.write(requests), strict=True):
        talk.add(written.tokens, GREEDY if talk.greedy else SAMPLED)
        talk.end, talk.answered = written.end, len(talk.tokens)


def _finish(talk: Talk) -> None:
    """Append the end-of-text token of an answer that came to its end."""
    if talk.end is not None and talk.origin[-1] != GIVEN:
        talk.add([talk.end], GREEDY if talk.greedy else SAMPLED)


def _request(
    talk: Talk, at_most: int, temperature: float, past_the_end: bool, seed: int
) -> Request:
    return Request(
        tuple(talk.tokens),
        at_most,
        temperature,
        past_the_end,
        seed=random.Random(f"{seed}/{talk.seed.id}").getrandbits(31),
    )
