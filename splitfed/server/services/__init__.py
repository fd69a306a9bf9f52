"""The services, thin: read the message, ask the coordinator, write the answer."""

from splitfed.server.services.federation import FederationService
from splitfed.server.services.generation import GenerationService
from splitfed.server.services.identity import Identity
from splitfed.server.services.joining import JoiningService
from splitfed.server.services.training import TrainingService

__all__ = ["FederationService", "GenerationService", "Identity", "JoiningService", "TrainingService"]
