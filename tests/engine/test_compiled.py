"""vLLM's default is to compile both models; the other tests do without, for their time."""

from vllm.config import CompilationMode

from tests.engine.engines import greedy, plain, stairs, statistics, token_ids
from tests.engine.test_heights import wild
from tests.engine.test_identity import prompts
from tests.tiny import TinyModels


def test_compiled_models_write_the_same(tiny: TinyModels) -> None:
    """Ragged heights, off and on, over batches that shrink: each its own shape."""
    texts = prompts(6, seed=71)
    engine = stairs(tiny.target, tiny.noisy, height=4, stairs_height="auto", enforce_eager=False)
    config = engine.llm_engine.vllm_config.compilation_config
    assert config.mode != CompilationMode.NONE
    wild(engine, seed=11)
    params = [greedy(20 + 5 * i) for i in range(6)]
    assert token_ids(engine, texts, params) == token_ids(plain(tiny.target), texts, params)
    stats = statistics(engine)
    assert all(stats["heights"])
    assert 0 < stats["accepted_per_position"][0] < stats["drafted_per_position"][0]
