"""`/v1/responses`: whole and streamed, continued by `previous_response_id`."""
