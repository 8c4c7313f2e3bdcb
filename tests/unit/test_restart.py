"""Whose run folder it is decides whether a worker continues it by itself."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hydra import compose, initialize_config_dir

from megatron_rema.config import ConfigError, as_mapping, check_run_dir, load
from megatron_rema.front_door import config_dir
from megatron_rema.trainer.restart import continued
from megatron_rema.trainer.run_folder import RunFolder


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Of a worker of launch 7."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return load(compose("config", overrides=[f"run_dir={tmp_path}/run", "optimizer.lr=1e-6"]))


def begin(config) -> None:
    RunFolder(config.run_dir, writes=True).write_config(as_mapping(config))


def test_a_first_start_begins(config):
    assert continued(config) == config


def test_a_worker_of_the_same_launch_continues(config):
    begin(config)
    assert continued(config) == replace(config, resume=True)


def test_a_restart_of_a_resumed_run_goes_on_from_its_latest_checkpoint_and_not_back_again(config):
    resumed = replace(config, resume=True, resume_from="runs/old/checkpoints/step_000002")
    begin(resumed)
    assert continued(resumed) == replace(config, resume=True, resume_from=None)
    begin(continued(resumed))  # what the restarted run writes is the same run to the next restart
    assert continued(resumed) == replace(config, resume=True, resume_from=None)


@pytest.mark.parametrize("launch", ["8", None])
def test_another_launch_and_none_continue_nothing(config, monkeypatch, launch):
    begin(config)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", launch) if launch else monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert continued(config) == config
    with pytest.raises(ConfigError, match="set resume=true to continue it"):
        check_run_dir(config.run_dir, continued(config).resume)


def test_launches_without_an_id_are_told_apart_by_the_restart_count(config, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # what torchrun calls every launch without --rdzv-id
    begin(config)
    assert continued(config) == config
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert continued(config).resume


def test_a_restart_with_other_settings_is_refused_by_the_key(config):
    begin(config)
    with pytest.raises(ConfigError, match=r"begun by this launch with optimizer\.lr=1e-06, and optimizer\.lr is 0\.5 now"):
        continued(replace(config, optimizer=replace(config.optimizer, lr=0.5)))


def test_a_run_killed_before_its_configuration_was_written_begins_again(config):
    begin(config)
    (RunFolder(config.run_dir, writes=False).path / "config.yaml").unlink()
    assert continued(config).resume


def test_a_run_continued_by_hand_belongs_to_the_launch_that_continued_it(config, monkeypatch, tmp_path):
    begin(config)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "8")
    begin(replace(config, resume=True))
    assert json.loads((tmp_path / "run" / "launch.json").read_text()) == {"launch_id": "8"}
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    begin(config)  # by hand, without torchrun: nobody's restart
    assert not (tmp_path / "run" / "launch.json").exists()
