"""What tests of sagas, buses and stores are made of."""
