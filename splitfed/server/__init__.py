"""The server daemon: services, sessions, the engine, the run's state and what survives a restart."""
