"""Who answers: honest clients and the compromised one."""
