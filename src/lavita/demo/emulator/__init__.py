"""The emulator study: a model that is told the player's actions, against the game itself."""
