"""A small deterministic battle in numpy, in place of StarCraft II.

Enemies walk to where the allies started, chase whom they see and shoot at the nearest. Allies do
only what they are told. So shooting whenever possible wins, standing still loses, walking off to
the north edge runs into the time limit. Both sides shoot at once, so a draw can happen.
"""

import numpy as np

KINDS = {  # health, shield
    "m": (45, 0),
    "a": (125, 0),
    "d": (150, 0),
    "s": (80, 80),
    "z": (100, 50),
    "c": (200, 150),
    "h": (80, 0),
    "l": (35, 0),
    "b": (30, 0),
    "k": (300, 0),
}
MAP_SIZE = 32
SIGHT, ALLY_RANGE, ENEMY_RANGE = 9, 6, 5
ENEMY_SPEED = 0.6  # an ally's is move_amount / 2 = 1: allies can run away
HEAL = 6
MOVES = np.array([(0, 1), (0, -1), (1, 0), (-1, 0)])  # actions 2 to 5: north, south, east, west


class Side:
    """The units of one side, as arrays of shape (n,); pos: (n, 2)."""

    def __init__(self, kinds, types, x, facing, rng):
        n = len(kinds)
        self.kinds = np.array(kinds)
        self.fights = self.kinds != "d"  # medivacs heal
        self.health_max, self.shield_max = np.array([KINDS[k] for k in kinds], dtype=float).T
        self.health, self.shield = self.health_max.copy(), self.shield_max.copy()
        self.cooldown = np.zeros(n)
        self.type_bits = np.array([[kind == t for t in types] for kind in kinds], dtype=float)
        column, row = np.divmod(np.arange(n), 8)
        row = row - (min(n, 8) - 1) / 2
        self.pos = np.stack([x + facing * column, MAP_SIZE / 2 + row], 1).astype(float)
        self.pos = np.clip(self.pos + rng.uniform(-0.3, 0.3, (n, 2)), 0, MAP_SIZE - 1)

    @property
    def alive(self):
        return self.health > 0

    @property
    def total(self):
        """Health and shield left, (n,); zero for the dead."""
        return np.where(self.alive, self.health + self.shield, 0.0)

    def hurt(self, damage):
        """Shield first, then health; who is left in peace for a step regrows a point of shield."""
        regrown = np.minimum(self.shield + 1, self.shield_max)
        through = np.maximum(damage - self.shield, 0)
        self.shield = np.where(damage > 0, np.maximum(self.shield - damage, 0), regrown)
        self.health = np.where(self.alive, np.maximum(self.health - through, 0), 0)
        self.health[self.health < 1e-6] = 0


class Battle:
    """One episode's fight of `allies` against `enemies`, lists of kinds."""

    def __init__(self, allies, enemies, rng):
        types = list(dict.fromkeys(allies))
        types = types if len(types) > 1 else []  # units of one type need no bits
        self.allies = Side(allies, types, 8, -1, rng)
        # The genuine package numbers the enemies' stalkers and zealots the other way round.
        self.enemies = Side(enemies, types[::-1] if types == ["s", "z"] else types, 24, 1, rng)
        shooters, n = self.allies.fights.sum(), len(enemies)
        self.ally_damage = self.enemies.total.sum() / (12 * shooters)  # 12 volleys win
        self.enemy_damage = self.allies.total.sum() / ((18 + n) * self.enemies.fights.sum())

    def distances(self, side, other):
        """(n of side, n of other)."""
        return np.linalg.norm(side.pos[:, None] - other.pos[None], axis=2)

    def avail_actions(self, n_actions):
        """Masks (n, A): no-op for the dead; stop, moves inside the map and targets for the rest."""
        side = self.allies
        avail = np.zeros((len(side.kinds), n_actions), dtype=int)
        avail[:, 1] = 1
        reach = side.pos[:, None] + MOVES[None]
        avail[:, 2:6] = ((reach >= 0) & (reach < MAP_SIZE)).all(axis=2)
        in_range = (self.distances(side, self.enemies) <= ALLY_RANGE) & self.enemies.alive
        avail[:, 6:] = in_range & side.fights[:, None]
        # A medivac's targets are its allies, other than medivacs.
        heal = (self.distances(side, side) <= ALLY_RANGE) & (side.alive & side.fights)
        k = min(len(side.kinds), n_actions - 6)
        avail[:, 6 : 6 + k] |= (heal & ~side.fights[:, None])[:, :k]
        avail[~side.alive] = np.eye(n_actions, dtype=int)[0]
        return avail

    def play(self, actions):
        """Both sides move and shoot at once, by where everybody is now. actions: n integers."""
        allies, enemies = self.allies, self.enemies
        to_enemies, to_allies = np.zeros(len(enemies.kinds)), np.zeros(len(allies.kinds))
        healed = np.zeros(len(allies.kinds))
        self._enemies_act(to_allies)  # shots at allies, before these move
        allies.cooldown[:] = 0
        for i, action in enumerate(actions):
            if 2 <= action < 6:
                allies.pos[i] += MOVES[action - 2]
            elif action >= 6:
                target, amount = (
                    (to_enemies, self.ally_damage) if allies.fights[i] else (healed, HEAL)
                )
                target[action - 6] += amount
                allies.cooldown[i] = 1
        allies.health = np.where(
            allies.alive, np.minimum(allies.health + healed, allies.health_max), 0
        )
        allies.hurt(to_allies)
        enemies.hurt(to_enemies)

    def _enemies_act(self, to_allies):
        """Shoot at the nearest ally if in range, else walk to it if in sight, else to the start."""
        allies, enemies = self.allies, self.enemies
        distance = np.where(allies.alive, self.distances(enemies, allies), np.inf)
        nearest, gap = distance.argmin(axis=1), distance.min(axis=1)
        shoots = enemies.alive & enemies.fights & (gap <= ENEMY_RANGE)
        np.add.at(to_allies, nearest[shoots], self.enemy_damage)
        rally = np.array([8, MAP_SIZE / 2])
        goal = np.where((gap < SIGHT)[:, None], allies.pos[nearest], rally)
        way = goal - enemies.pos
        length = np.maximum(np.linalg.norm(way, axis=1), 1e-9)
        stride = np.minimum(ENEMY_SPEED, np.maximum(length - 1, 0)) * (enemies.alive & ~shoots)
        enemies.pos += way * (stride / length)[:, None]

    def outcome(self):
        """1 won, -1 lost, 0 draw, None if the battle goes on. A side of only medivacs is beaten."""
        allies = (self.allies.alive & self.allies.fights).any()
        enemies = (self.enemies.alive & self.enemies.fights).any()
        if not allies and not enemies and self.allies.fights.all():
            return 0
        if not allies:
            return -1  # on MMM a draw counts as lost, as in the genuine package
        return None if enemies else 1
