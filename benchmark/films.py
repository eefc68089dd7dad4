"""Films of one episode, and replays, for benchmark/evaluate.py.

A kind of film is a function of the games: it gives look(obs [n, O]), what is kept of game 0 before
a step, and draw(what was kept), a picture of each.
"""

import contextlib
import io

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import maipg_smac as smac

COLOURS = [(0, 114, 178), (213, 94, 0)]  # we, they: Okabe and Ito's blue and vermilion
SIDE = 960  # pixels of the longer side, before they are halved
HEAD = 20  # pixels above, for the text
WIDTH = 370  # pixels that it needs
LIMIT = 2_000_000  # bytes of a film


def capture(title, envs_class, victory, film, act, args, seed, folder):
    """Film an episode into film.gif (StarCraft II: a replay) in the folder; a line about it."""
    if film is replay:
        return f"replay in {folder}: {replay(act, args, seed, folder)}"
    with contextlib.closing(envs_class(args)) as games:
        look, draw = film(games)
        seen, returns, won = episode(act, games, seed, look)
        texts = [f"{title}   step {t}   return {x:.2f}" for t, x in enumerate(returns)]
        if victory:
            texts[-1] += "   " + ("" if won else "not ") + victory
        pictures = tqdm(draw(seen), "drawing", len(seen), disable=None)
        frames = list(map(captioned, pictures, texts))
    (folder / "film.gif").write_bytes(gif(frames, min(max(12_000 // len(frames), 50), 200)))
    return f"film {folder / 'film.gif'}: {texts[-1]}"


def episode(act, games, seed, look):
    """An episode of game 0, at most 1,000 steps: what look() kept, the last one twice; the return
    before each step and at the end; and whether it was won."""
    (obs, _, avail), hidden, done, seen, returns = games.reset(seed), None, False, [], [0.0]
    with tqdm(desc="film", unit="step", disable=None) as bar:
        while not done and len(seen) < 1000:
            seen.append(look(obs[0]))
            actions, hidden = act(obs, avail, hidden)
            obs, _, avail, *ended = games.step(actions)
            reward, done, *won = (x[0].item() for x in ended)
            returns.append(returns[-1] + reward)
            bar.update()
    return [*seen, seen[-1]], returns, won == [True]


def captioned(picture, text):
    """A picture below a line of text."""
    whole = ImageOps.expand(picture, (0, HEAD, max(0, WIDTH - picture.width), 0), "white")
    ImageDraw.Draw(whole).text((8, 3), text, "black", ImageFont.load_default(14))
    return whole.quantize()


def gif(frames, pause):
    """A film, `pause` milliseconds a frame; it rests at its end. Of every other frame, if larger
    than the LIMIT."""
    content, times = io.BytesIO(), [pause] * (len(frames) - 1) + [2500]
    frames[0].save(content, "gif", save_all=True, append_images=frames[1:], duration=times, loop=0)
    if content.tell() > LIMIT and len(frames) > 2:
        return gif(frames[:-1:2] + frames[-1:], 2 * pause)
    return content.getvalue()


# ---------- particle worlds, PettingZoo
def particles(games):
    """mpe2's own pictures of our worlds."""
    from mpe2 import simple_formation_v1, simple_line_v1, simple_spread_v3

    modules = {"spread": simple_spread_v3, "line": simple_line_v1, "formation": simple_formation_v1}

    def draw(seen):
        make = modules[games.task].parallel_env
        env = make(N=games.n, render_mode="rgb_array", dynamic_rescaling=True)
        env.reset(seed=0)
        for places in seen:
            for entity, place in zip(env.unwrapped.world.entities, places):
                entity.state.p_pos = place
            yield Image.fromarray(env.render()).reduce(2)
        env.close()

    return lambda obs: torch.cat([games.pos[0], games.landmarks[0]]).double().numpy(), draw


def pettingzoo(games):
    """What the environment's own render() gives."""
    from pettingzoo import AECEnv, ParallelEnv

    make = games.make
    with contextlib.closing(make()) as env:
        # These two only raise.
        drawn = type(env.unwrapped).render not in [AECEnv.render, ParallelEnv.render]
    # A function that takes no arguments has chosen its mode itself.
    with contextlib.suppress(TypeError):
        make(render_mode="rgb_array").close()
        games.make = lambda: make(render_mode="rgb_array")

    def look(obs):
        frame = games.games[0].render() if drawn else None
        if np.ndim(frame) != 3:
            raise smac.UsageError(f"--env-id {games.args.env_id}: its render() gives no rgb_array")
        picture = Image.fromarray(np.uint8(frame))
        picture.thumbnail((SIDE // 2, SIDE // 2))
        return picture

    return look, iter


# ---------- football
def football(games):
    """The pitch from above, from simple115v2: the right half, or as far as the ball goes."""

    def draw(seen):
        left = max(-1.1, min(-0.1, *(obs[0, 88] - 0.3 for obs in seen)))
        return [pitch(obs, left) for obs in seen]

    return lambda obs: obs.numpy(), draw


def pitch(obs, left):
    """Both teams, the ball, larger when it is high up, and black rings around the players that are
    steered, in obs [n, 115]; from x = left on."""
    zoom = SIDE / (1.1 - left)  # pixels per unit of length; a pitch is 2 x 0.84
    place = lambda x, y: (zoom * (x - left), zoom * (y + 0.47))
    picture = Image.new("RGB", (SIDE, int(0.94 * zoom)), (226, 240, 217))
    canvas = ImageDraw.Draw(picture)
    # The pitch and its halves, penalty areas, goals.
    lines = [(-1, 1, 0.42), (0, 1, 0.42), (-1, -0.7, 0.24), (0.7, 1, 0.24)]
    for x_0, x_1, y in [*lines, (-1.05, -1, 0.044), (1, 1.05, 0.044)]:
        canvas.rectangle([place(x_0, -y), place(x_1, y)], outline="gray", width=4)
    steered = obs[:, 97:108].argmax(-1)
    for team, colour in enumerate(COLOURS):
        for i, (x, y) in enumerate(obs[0, 44 * team : 44 * team + 22].reshape(11, 2)):
            # Who is not there stands at (-1, -1), beside the pitch.
            edge = "black" if team == 0 and i in steered else "white"
            canvas.circle(place(x, y), 0.02 * zoom, colour, edge, int(0.007 * zoom))
    x, y, height = obs[0, 88:91]
    canvas.circle(place(x, y), (0.01 + 0.004 * height) * zoom, "white", "black", 4)
    return picture.reduce(2)


# ---------- StarCraft
def smax(games):
    """Both sides, in the rectangle in which they live."""
    from jaxmarl.environments.smax import HeuristicEnemySMAX, map_name_to_scenario

    env = HeuristicEnemySMAX(scenario=map_name_to_scenario(games.args.map_name))

    def draw(worlds):
        lived = np.concatenate([world.unit_positions[world.unit_alive] for world in worlds])
        view = lived.min(0) - 1, lived.max(0) + 1
        return [battle(env, world, view) for world in worlds]

    return lambda obs: games.jax.tree.map(lambda x: np.array(x[0]), games.games[1].state), draw


def battle(env, world, view):
    """A world state: units as discs, filled as far as they have health, with their type's letter;
    lines are orders to shoot, crosses the dead."""
    (low, high), kinds, allies = view, world.unit_types, env.num_allies
    zoom = SIDE / (high - low).max()  # pixels per unit of length
    picture = Image.new("RGB", tuple(map(int, zoom * (high - low))), "white")
    canvas, letter = ImageDraw.Draw(picture), ImageFont.load_default(0.7 * zoom)
    place = zoom * (world.unit_positions - low)
    place[:, 1] = picture.height - place[:, 1]  # north is up
    radius = zoom * np.array(env.unit_type_radiuses)[kinds]
    health = world.unit_health / np.array(env.unit_type_health)[kinds]
    colour = [COLOURS[int(i >= allies)] for i in range(len(kinds))]
    for spot in place[~world.unit_alive]:
        canvas.text(tuple(spot), "x", "silver", letter, anchor="mm")
    shots = world.prev_attack_actions - env.num_movement_actions
    for i in np.flatnonzero(world.unit_alive & (shots >= 0)):
        # Each side numbers the other one from the border between them.
        target = allies + shots[i] if i < allies else allies - 1 - shots[i]
        canvas.line([*place[i], *place[target]], fill=colour[i], width=4)
    for i in np.flatnonzero(world.unit_alive):
        pale = tuple(c + (255 - c) * 2 // 3 for c in colour[i])
        canvas.circle(tuple(place[i]), radius[i], pale, colour[i], 3)
        box = [*(place[i] - radius[i]), *(place[i] + radius[i])]
        canvas.pieslice(box, -90, -90 + 360 * health[i], fill=colour[i])
        edge = {"stroke_width": 2, "stroke_fill": colour[i], "anchor": "mm"}
        canvas.text(tuple(place[i]), env.unit_type_shorthands[kinds[i]], "white", letter, **edge)
    return picture.reduce(2)


def replay(act, args, seed, folder):
    """Play an episode of StarCraft II here; the game writes its replay into the folder; outcome."""
    from smac.env import StarCraft2Env

    place, hidden, done = str(folder.resolve()), None, False
    with contextlib.closing(StarCraft2Env(args.map_name, seed=seed, replay_dir=place)) as env:
        env.reset()
        while not done:
            obs = torch.tensor(np.hstack([env.get_obs(), np.eye(env.n_agents)])).float()
            avail = torch.tensor(env.get_avail_actions()).bool()
            actions, hidden = act(obs[None], avail[None], hidden)
            _, done, info = env.step(actions[0].tolist())
            if not info:  # smac's answer to a crash
                raise smac.GameError("the game crashed")
        env.save_replay()
    return "won" if info["battle_won"] else "not won"
