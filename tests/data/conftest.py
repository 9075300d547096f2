import pytest
from data.made_files import pair, write_tar


@pytest.fixture
def shards(tmp_path):
    for shard in range(4):
        samples = {f"{shard}{i}": pair(10 * shard + i) for i in range(7)}
        samples[f"{shard}3"]["png"] = b"broken"
        write_tar(tmp_path / f"x-{shard}.tar", samples)
    return str(tmp_path / "x-{0..3}.tar")
