"""What a step costs with axontrain, with the loop an expert writes by hand, and with other frameworks."""
