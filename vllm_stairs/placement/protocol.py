"""What the target and a draft with a device of its own say to each other.

Two messages a step, in msgpack: typed, checked when they are read, and never pickled. What they
hold grows with the tokens of the step, not with the text. An integer takes 1 to 5 bytes, a float 9:

- to the draft: at most 5 bytes per new token of the text, and about 15 per request;
- from it: at most 5 bytes per drafted token, 14 where its probability is asked for.

A draft is the most likely token after the text before it. So its proposal is one point, and the
acceptance rule, greedy or sampled, needs its id and nothing else.
"""

import msgspec


class Text(msgspec.Struct, frozen=True, array_like=True):
    """What is new in a request's text, and how many tokens are to be drafted after it.

    Attributes:
        request: the engine's number for it.
        start: place of the first of ``token_ids`` in the text. Tokens that were sent before may be
            sent again.
        token_ids: the text from there to its end.
        height: drafts wanted; at least 1.
    """

    request: int
    start: int
    token_ids: list[int]
    height: int


class Step(msgspec.Struct, frozen=True, array_like=True):
    """One step of an engine.

    Attributes:
        engine: which one.
        texts: of the requests that are to draft.
        finished: requests that have ended since the last message.
        patience_ms: drafting ends with the pass in which this time is over.
        ahead: further drafts to write for each text once the answer is away, as if all of them were
            kept; 0: none.
        confidences: whether the drafts' probabilities are wanted.
    """

    engine: str
    texts: list[Text]
    finished: list[int]
    patience_ms: float
    ahead: int
    confidences: bool


class Reply(msgspec.Struct, frozen=True, array_like=True):
    """The answer to a :class:`Step`.

    Attributes:
        token_ids: per text its drafts, as many as were wanted or as there was time for.
        confidences: per text the draft's probability of each of them; empty where not asked for.
        missing: requests whose text is not known up to ``start``: they are to be sent whole.
        busy_ms: from the arrival of the step to this answer.
        ready: whether all drafts had been written before they were asked for.
    """

    token_ids: list[list[int]]
    confidences: list[list[float]]
    missing: list[int]
    busy_ms: float
    ready: bool

    def check(self, texts: int, vocab_size: int) -> None:
        """See to it that this can be the answer to a step.

        Args:
            texts: of the step.
            vocab_size: the target's ids are below it.

        Raises:
            ValueError: it cannot.
        """
        widths = [len(ids) for ids in self.token_ids]
        if len(widths) != texts or (
            self.confidences and [len(own) for own in self.confidences] != widths
        ):
            raise ValueError("the draft's answer does not fit the question")
        if any(not 0 <= id_ < vocab_size for ids in self.token_ids for id_ in ids):
            raise ValueError("the draft's answer has ids that the target does not know")


_encoder = msgspec.msgpack.Encoder()
_steps = msgspec.msgpack.Decoder(Step)
_replies = msgspec.msgpack.Decoder(Reply)


def encode(message: Step | Reply) -> bytes:
    """A message as it travels."""
    return _encoder.encode(message)


def decode_step(message: bytes) -> Step:
    """What an engine said.

    Raises:
        msgspec.DecodeError: it is no step.
    """
    return _steps.decode(message)


def decode_reply(message: bytes) -> Reply:
    """What the draft answered.

    Raises:
        msgspec.DecodeError: it is no reply.
    """
    return _replies.decode(message)
