"""What a bar, a signal, an alert and a read cost in storage: counted on the real services, priced by a model."""
