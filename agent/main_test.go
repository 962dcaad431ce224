package agent_test

import (
	"testing"

	"warden/internal/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }
