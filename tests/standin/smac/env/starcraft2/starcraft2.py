"""StarCraft2Env with the genuine interface, rewards and quirks, over `battle.Battle`.

Misuse that the genuine package lets pass, or answers in its own ways, raises
AssertionError("misuse: ..."): a step before reset or after an episode's end, a second reset in one
episode, an action that is unavailable or no integer, a wrong number of actions, play after close().
"""

import atexit
import operator
import os
import time
from datetime import datetime
from pathlib import Path

import numpy as np
from absl import flags

from smac.env.starcraft2 import battle, faults
from smac.env.starcraft2.maps import get_map_params
from smac.env.starcraft2.maps.smac_maps import MAPS, units

OPTIONS = {  # the genuine keyword arguments, other than map_name and seed, and their defaults
    "step_mul": 8,
    "move_amount": 2,
    "difficulty": "7",
    "game_version": None,
    "continuing_episode": False,
    "obs_all_health": True,
    "obs_own_health": True,
    "obs_last_action": False,
    "obs_pathing_grid": False,
    "obs_terrain_height": False,
    "obs_instead_of_state": False,
    "obs_timestep_number": False,
    "state_last_action": True,
    "state_timestep_number": False,
    "reward_sparse": False,
    "reward_only_positive": True,
    "reward_death_value": 10,
    "reward_win": 200,
    "reward_defeat": 0,
    "reward_negative_scale": 0.5,
    "reward_scale": True,
    "reward_scale_rate": 20,
    "replay_dir": "",
    "replay_prefix": "",
    "window_size_x": 1920,
    "window_size_y": 1200,
    "heuristic_ai": False,
    "heuristic_rest": False,
    "debug": False,
}


def misuse(wrong, message):
    """AssertionError if `wrong`; works under python -O as well."""
    if wrong:
        raise AssertionError(f"misuse: {message}")


class StarCraft2Env:
    """n agents against scripted enemies. Actions: 0 no-op (dead), 1 stop, 2-5 moves, 6+ targets."""

    def __init__(self, map_name="8m", *, seed=None, **options):
        if set(options) - set(OPTIONS):
            raise TypeError(f"unexpected arguments: {sorted(set(options) - set(OPTIONS))}")
        vars(self).update(OPTIONS | options)
        settings = get_map_params(map_name)
        self.map_name, self._seed = map_name, seed
        self.obs_own_health = self.obs_own_health or self.obs_all_health
        self.n_agents, self.n_enemies = settings["n_agents"], settings["n_enemies"]
        self.episode_limit, self.map_type = settings["limit"], settings["map_type"]
        self.n_actions = 6 + self.n_enemies
        self.shield_bits_ally = int(settings["a_race"] == "P")
        self.shield_bits_enemy = int(settings["b_race"] == "P")
        self.unit_type_bits = settings["unit_type_bits"]
        self.max_reward = self.n_enemies * self.reward_death_value + self.reward_win
        self.battles_won = self.battles_game = self.timeouts = self.force_restarts = 0
        self._episode_count = self._episode_steps = self._total_steps = 0
        self._step_calls = self._reset_calls = 0
        self._phase = "new"  # -> playing -> over -> playing ...; closed
        self._game = self._battle = None
        self._faults = faults.Faults(seed)
        self._log("init", map_name=map_name, **options)
        # As in the genuine package: ends the game at a normal exit, not when the process is killed.
        atexit.register(self._at_exit)

    # ---------------------------------------------------------------------------------- episodes
    def reset(self):
        """Start an episode, in the running game after the first. Returns (obs, state)."""
        self._reset_calls += 1
        self._log("reset", reset=self._reset_calls)
        misuse(self._phase == "closed", "reset after close")
        misuse(self._phase == "playing", "second reset without an episode having ended")
        self._phase = "over"  # if this reset fails, another one may follow
        fault = self._fault("reset", self._reset_calls)
        if fault == "no_launch":
            if self._game:
                self._game.close()
            raise self._error
        if self._episode_count == 0:
            self._launch()
        elif not self._game.running:
            self.full_restart()
        if fault == "crash_on_reset":
            self.full_restart()
            raise KeyError(0)
        allies, enemies, _ = MAPS[self.map_name]
        self._battle = battle.Battle(units(allies), units(enemies), self._rng)
        self._episode_steps = 0
        self.last_action = np.zeros((self.n_agents, self.n_actions))
        self._dead_allies = np.full(self.n_agents, False)  # whose death has been counted
        self._dead_enemies = np.full(self.n_enemies, False)
        if self._episode_count == 0:  # the genuine quirk: grows again if the first episode is cut
            self.max_reward += float(self._battle.enemies.total.sum())
        if fault == "dead_reset":
            self.full_restart()
            self._battle.allies.health[:] = self._battle.enemies.health[:] = 0
        # A dead reset may be stepped (a draw, as in the genuine package) or be reset again.
        self._masks = None  # computed when first asked for
        self._phase = "dead" if fault == "dead_reset" else "playing"
        return self.get_obs(), self.get_state()

    def step(self, actions):
        """Play one step. Returns (reward, terminated, info); (0, True, {}) if the game crashed."""
        self._step_calls += 1
        self._log("step", step=self._step_calls)
        actions = self._check_actions(actions)
        fault = self._fault("step", self._step_calls)
        if fault == "die":
            os._exit(1)
        if fault == "raise":
            self._phase = "over"
            self._game.close()
            raise self._error
        self.last_action = np.eye(self.n_actions)[actions]
        if fault == "crash" or not self._game.running:
            self.full_restart()
            return 0, True, {}
        self._total_steps += 1
        self._episode_steps += 1
        allies, enemies = self._battle.allies, self._battle.enemies
        before = allies.total, enemies.total
        self._battle.play(actions)
        self._masks = None
        reward = self._battle_reward(*before)
        outcome = self._battle.outcome()
        info = {
            "battle_won": outcome == 1,
            "dead_allies": int((~allies.alive).sum()),
            "dead_enemies": int((~enemies.alive).sum()),
        }
        if outcome is not None:
            bonus = {1: self.reward_win, -1: self.reward_defeat, 0: 0}[outcome]
            reward = outcome or reward if self.reward_sparse else reward + bonus
            self.battles_won += outcome == 1
        elif self._episode_steps >= self.episode_limit:
            self.timeouts += 1
            if self.continuing_episode:
                info["episode_limit"] = True
        terminated = outcome is not None or self._episode_steps >= self.episode_limit
        if terminated:
            self._phase = "over"
            self._episode_count += 1
            self.battles_game += 1
        if self.reward_scale:
            reward /= self.max_reward / self.reward_scale_rate
        return reward, terminated, info

    def _check_actions(self, actions):
        """The actions as a list of integers, each available to its agent."""
        misuse(self._phase == "closed", "step after close")
        misuse(self._phase == "new", "step before reset")
        misuse(self._phase == "over", "step after the end of an episode, without reset")
        misuse(len(actions) != self.n_agents, f"{len(actions)} actions, {self.n_agents} agents")
        for i, action in enumerate(actions):
            number = hasattr(action, "__index__") and not isinstance(action, bool)
            misuse(not number, f"action {action!r} of agent {i} is no integer")
        actions = [operator.index(action) for action in actions]
        for i, (action, mask) in enumerate(zip(actions, self.get_avail_actions(), strict=True)):
            known = 0 <= action < self.n_actions
            misuse(not known or not mask[action], f"action {action} of agent {i} is unavailable")
        return actions

    def _battle_reward(self, allies_before, enemies_before):
        """Damage dealt and kills; abs(), so that regrown enemy shields count as positive too."""
        allies, enemies = self._battle.allies, self._battle.enemies
        killed = (~enemies.alive & ~self._dead_enemies).sum()
        lost = (~allies.alive & ~self._dead_allies).sum()
        self._dead_enemies, self._dead_allies = ~enemies.alive, ~allies.alive
        if self.reward_sparse:
            return 0
        dealt = enemies_before.sum() - enemies.total.sum() + self.reward_death_value * killed
        if self.reward_only_positive:
            return float(abs(dealt))
        taken = allies_before.sum() - allies.total.sum() + self.reward_death_value * lost
        return float(dealt - self.reward_negative_scale * taken)

    # ------------------------------------------------------------------------- the running game
    def _launch(self):
        """Start a game; one that ran before ends (genuine: when it is garbage-collected)."""
        if self._game:
            self._game.close()
        self._game = faults.Game()
        self._rng = np.random.default_rng(self._seed)  # the same battles again after a launch
        child, folder = self._game.process.pid, self._game.folder
        self._log("launch", child=child, folder=folder, sc2_timeout=flags.FLAGS.sc2_timeout)

    def full_restart(self):
        """End the game and launch another; the episode that was on is lost."""
        misuse(self._phase in ("new", "closed"), "full_restart without a game")
        self._log("full_restart")
        self._launch()
        self.force_restarts += 1
        self._phase = "over"

    def close(self):
        """End the game; may be called again."""
        self._log("close")
        self._phase = "closed"
        if self._game:
            self._game.close()

    def _at_exit(self):
        if self._game and self._phase != "closed":
            self._log("atexit")
            self._game.close()

    def save_replay(self):
        """Write <replay_dir>/<prefix>_<time>.SC2Replay; relative to $SC2PATH/Replays."""
        self._log("save_replay")
        misuse(self._phase in ("new", "closed"), "save_replay without a game")
        root = os.environ.get("SC2PATH")
        misuse(
            not root and not os.path.isabs(self.replay_dir), "no SC2PATH, no absolute replay_dir"
        )
        folder = Path(root or "/", "Replays", self.replay_dir)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{self.replay_prefix or self.map_name}_{datetime.now():%Y-%m-%d-%H-%M-%S}"
        (folder / f"{name}.SC2Replay").write_bytes(b"stand-in replay\n")

    def _fault(self, counter, count):
        """Kind of the fault due at this call, or None; hangs here, readies the error to raise."""
        fault = self._faults.due(counter, count)
        kind = fault.get("kind")
        if kind:
            self._log("fault", kind=kind, **{counter: count})
        if kind in ("hang", "slow"):
            time.sleep(fault.get("seconds", 1_000_000))
        self._error = faults.connection_error(fault, kind)
        return kind

    def _log(self, call, **entry):
        seed = None if self._seed is None else int(self._seed)
        faults.log(call, seed=seed, max_reward=float(self.max_reward), **entry)

    # ------------------------------------------------------------------------- what agents see
    def get_avail_actions(self):
        """Masks: n lists of n_actions zeros and ones."""
        shown = self._battle_shown()
        if self._masks is None:
            self._masks = shown.avail_actions(self.n_actions).tolist()
        return [mask[:] for mask in self._masks]

    def get_avail_agent_actions(self, agent_id):
        return self.get_avail_actions()[agent_id]

    def get_obs(self):
        """List of n arrays (O,), float32; zeros for the dead."""
        return [self.get_obs_agent(i) for i in range(self.n_agents)]

    def get_obs_agent(self, agent_id):
        """Moves, then rows for enemies, for other allies, then the agent's own features: (O,)."""
        me, mask = self._battle_shown().allies, self.get_avail_agent_actions(agent_id)
        enemies = self._seen_features(agent_id, self._battle.enemies, mask[6:])
        others = np.delete(self._seen_features(agent_id, me, np.ones(self.n_agents)), agent_id, 0)
        own = np.column_stack([*self._health(me, self.obs_own_health), me.type_bits])
        # The map is flat and without obstacles: pathing 1, height 0.5.
        flat = [1.0] * 8 * self.obs_pathing_grid + [0.5] * 9 * self.obs_terrain_height
        obs = np.concatenate([mask[2:6], flat, enemies.ravel(), others.ravel(), own[agent_id]])
        obs = (obs * me.alive[agent_id]).astype(np.float32)
        if self.obs_timestep_number:  # the dead are told, too
            obs = np.append(obs, self._episode_steps / self.episode_limit)
        return obs

    def _seen_features(self, agent_id, side, first):
        """A row per unit of `side`: first, distance, x, y, health, shield, type, last action."""
        me = self._battle.allies
        delta = (side.pos - me.pos[agent_id]) / battle.SIGHT
        distance = np.hypot(*delta.T)
        columns = [first, distance, delta, *self._health(side, self.obs_all_health), side.type_bits]
        if side is me and self.obs_last_action:
            columns.append(self.last_action)
        return np.column_stack(columns) * (side.alive & (distance < 1))[:, None]

    @staticmethod
    def _health(side, shown):
        """Columns of health and, for Protoss, shield, as fractions; none if not to be shown."""
        columns = [side.health / side.health_max]
        columns += [side.shield / side.shield_max] if side.shield_max.any() else []
        return columns if shown else []

    def get_state(self):
        """(S,), float32: rows for allies, rows for enemies, last actions; zeros for the dead."""
        if self.obs_instead_of_state:
            return np.concatenate(self.get_obs()).astype(np.float32)
        parts = []
        for side in (self._battle_shown().allies, self._battle.enemies):
            health, *shield = self._health(side, True)
            cooldown = [side.cooldown] if side is self._battle.allies else []
            pos = side.pos / battle.MAP_SIZE - 0.5
            rows = np.column_stack([health, *cooldown, pos, *shield, side.type_bits])
            parts.append((rows * side.alive[:, None]).ravel())
        parts += [self.last_action.ravel()] if self.state_last_action else []
        steps = self._episode_steps / self.episode_limit
        parts += [[steps]] if self.state_timestep_number else []
        return np.concatenate(parts).astype(np.float32)

    def _battle_shown(self):
        """The battle, if there is one to look at: after an episode's end its last moment."""
        misuse(self._phase == "closed", "observation after close")
        misuse(self._battle is None, "observation before reset")
        return self._battle

    # -------------------------------------------------------------------------------- questions
    @property
    def ally_state_attr_names(self):
        names = ["health", "energy/cooldown", "rel_x", "rel_y"] + ["shield"] * self.shield_bits_ally
        return names + [f"type_{bit}" for bit in range(self.unit_type_bits)]

    @property
    def enemy_state_attr_names(self):
        names = ["health", "rel_x", "rel_y"] + ["shield"] * self.shield_bits_enemy
        return names + [f"type_{bit}" for bit in range(self.unit_type_bits)]

    def get_total_actions(self):
        return self.n_actions

    def get_obs_size(self):
        bits, health, own = self.unit_type_bits, self.obs_all_health, self.obs_own_health
        enemy = 4 + bits + health * (1 + self.shield_bits_enemy)
        ally = 4 + bits + health * (1 + self.shield_bits_ally)
        ally += self.obs_last_action * self.n_actions
        moves = 4 + 8 * self.obs_pathing_grid + 9 * self.obs_terrain_height
        self_feats = bits + own * (1 + self.shield_bits_ally) + self.obs_timestep_number
        return moves + self.n_enemies * enemy + (self.n_agents - 1) * ally + self_feats

    def get_state_size(self):
        if self.obs_instead_of_state:
            return self.n_agents * self.get_obs_size()
        size = self.n_agents * len(self.ally_state_attr_names)
        size += self.n_enemies * len(self.enemy_state_attr_names)
        size += self.n_agents * self.n_actions * self.state_last_action
        return size + self.state_timestep_number

    def get_env_info(self):
        """Shapes and limits; needs no reset."""
        return {
            "state_shape": self.get_state_size(),
            "obs_shape": self.get_obs_size(),
            "n_actions": self.n_actions,
            "n_agents": self.n_agents,
            "episode_limit": self.episode_limit,
            "agent_features": self.ally_state_attr_names,
            "enemy_features": self.enemy_state_attr_names,
        }

    def get_stats(self):
        """Counts of episodes without crashed ones; ZeroDivisionError before the first has ended."""
        return {
            "battles_won": self.battles_won,
            "battles_game": self.battles_game,
            "battles_draw": self.timeouts,
            "win_rate": self.battles_won / self.battles_game,
            "timeouts": self.timeouts,
            "restarts": self.force_restarts,
        }

    def seed(self):
        return self._seed
