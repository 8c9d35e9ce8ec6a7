"""The round loop and what it needs: clients, sums, topologies, ledger, records."""
