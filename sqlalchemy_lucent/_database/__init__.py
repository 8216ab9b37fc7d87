"""What all work on a database needs: connections, faults, relations, reflection, visibility."""
