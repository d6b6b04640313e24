"""Reward functions as users give them: functions, names, models, one or several; and what is refused beside them."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from posttrain.errors import ConfigError
from posttrain.rewards import LIBRARY
from posttrain.rewards.functions import Rewards, name_of
from posttrain.rewards.models import RewardModel, load_reward_model
from posttrain.trainers.online_config import OnlineConfig
from posttrain.trainers.opening import as_dict

logger = logging.getLogger("posttrain")


def open_rewards(reward_funcs: Any, tokenizers: Any, args: OnlineConfig) -> Rewards:
    """Raises ConfigError for what is no reward."""
    given = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    if not given or given == [None]:
        raise ConfigError("reward_funcs is needed: what is a completion worth?",
                          hint="a function (completions, **columns) -> list of numbers")  # fmt: skip
    of_each = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers] * len(given)
    if len(of_each) != len(given):
        raise ConfigError(f"reward_processing_classes has {len(of_each)} entries for {len(given)} reward_funcs")
    functions: dict[str, Callable[..., Any]] = {}
    for one, tokenizer in zip(given, of_each, strict=True):
        function = _opened(one, tokenizer)
        if isinstance(function, RewardModel):
            function.move_to(args.device)
            function.template_kwargs = as_dict(args.chat_template_kwargs)
        name = unique = name_of(function)
        number = 2
        while unique in functions:
            unique, number = f"{name}_{number}", number + 1
        functions[unique] = function
    if args.reward_weights is not None and not isinstance(args.reward_weights, list | tuple):
        raise ConfigError(f"reward_weights={args.reward_weights!r} must be a list with a number for each function")
    weights = args.reward_weights if args.reward_weights is not None else [1.0] * len(functions)
    return Rewards(functions, list(weights), deadline=args.reward_timeout)


def _opened(one: Any, tokenizer: Any) -> Callable[..., Any]:
    if isinstance(one, str):
        if one in LIBRARY:
            return LIBRARY[one]
        return named_reward(one) if ":" in one else load_reward_model(one, tokenizer)
    if isinstance(one, nn.Module):
        return RewardModel.of(one, tokenizer)
    if not callable(one):
        raise ConfigError(f"reward_funcs has {one!r}, which is no function, model or name")
    return one


def named_reward(name: str) -> Callable[..., Any]:
    """`package.module:function`."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"reward_funcs names {name!r}, which cannot be imported: {error}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # code of the user's own; sys.exit(0) in it must not look like success
        raise ConfigError(f"reward_funcs names {name!r}, whose module cannot be imported: {type(error).__name__}: "
                          f"{error}") from error  # fmt: skip
    if not callable(found):
        raise ConfigError(f"reward_funcs names {name!r}, which is no function")
    return found


def refuse_online(**given: Any) -> None:
    for name, value in given.items():
        if value:
            raise ConfigError(f"{name} is not honoured yet", hint="rollout_func can take several turns and call tools")
