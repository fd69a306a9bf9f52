"""What an agent and a server compute in a round, and on which examples, whatever link lies between them."""
