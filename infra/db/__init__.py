"""What an operator does with the storage: check, save, restore, migrate, export and import. Behind `troop db`."""
