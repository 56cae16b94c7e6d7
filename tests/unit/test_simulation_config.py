"""A simulated run's settings: what is wrong is said at once, with its key."""

from pathlib import Path

import pytest

from commrt.errors import ConfigError
from commrt.simulation.config import Config
from commrt.simulation.policies import FedBuff

PRESETS = sorted((Path(__file__).parents[2] / "launch/federated").glob("*.toml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets(path: Path) -> None:
    assert Config.load(path).clients.count > 1


def test_what_is_set_is_there(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text(
        'uplink = "fp32"\n[local]\nlr = 1\n[schedule]\npolicy = "fedbuff"\nbuffer = 5\n'
    )
    config = Config.load(
        file,
        [
            "schedule.concurrency=9",
            "local.lr=0.25",
            "uplink=fp16",
            "traces.file=a b",
            "run.seed=7",
        ],
    )
    assert config.schedule == FedBuff(buffer=5, concurrency=9)
    assert (config.local.lr, config.uplink, config.run.seed) == (0.25, "fp16", 7)
    assert config.traces.file == Path("a b")


def test_all_errors_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Config.make(
            {
                "uplnk": "fp32",
                "local": {"lr": "much", "batchsize": 3},
                "clients": {"count": 0},
                "schedule": {"policy": "fedavg"},
                "run": {"seed": -1},
                "traces": 5,
                "data": {"name": True},
            }
        )
    assert str(caught.value).splitlines() == [
        "uplnk is unknown, perhaps uplink",
        "data: name is True: must be of type str",
        "clients: count is 0: must be at least 1",
        "local: batchsize is unknown, perhaps batch_size",
        "local: lr is 'much': must be of type float",
        "schedule: cohort is missing",
        "traces: is 5: must be a section",
        "run: seed is -1: must be at least 0",
    ]


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"uplink": "zip"}, "uplink: codec='zip': must start with one of"),
        ({"uplink": 3}, "uplink: is 3: must be text"),
        ({"schedule": {"policy": "best"}}, "schedule: policy is 'best': must be one of fedavg"),
        ({"local": {"vectorise": "yes"}}, "local: vectorise is 'yes': must be of type"),
        ({"clients": {"state_mb": -1}}, "clients: state_mb is -1.0: must be at least 0"),
        ({"clients": {"state_folder": "/none"}}, "clients: state_folder is '/none': must be a fo"),
        ({"schedule": "fedavg"}, "schedule: is 'fedavg': must be a section"),
        ({"schedule": {"policy": ["fedavg"]}}, "schedule: policy is .* must be one of fedavg"),
        ({"clients": {"least": -1}}, "clients: least is -1: must be at least 0"),
        ({"run": {"seed": 2**63}}, "run: seed is 9223372036854775808: must be below"),
        ({"server": {"optimizer": "best"}}, "server: optimizer is 'best': must be one of sgd"),
    ],
)
def test_a_wrong_value_is_named(tree: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Config.make(tree)


def test_files_and_assignments(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    with pytest.raises(ConfigError, match="No such file"):
        Config.load(file)
    file.write_text("[local\n")
    with pytest.raises(ConfigError, match=r"a\.toml"):
        Config.load(file)
    file.write_bytes(b"uplink = '\xff'")
    with pytest.raises(ConfigError, match=r"a\.toml"):
        Config.load(file)
    file.write_text('uplink = "fp32"\n')
    for assignment in ("local.lr", "a.b.c=1", "uplink.x=1"):
        with pytest.raises(ConfigError, match=f"--set {assignment}"):
            Config.load(file, [assignment])
