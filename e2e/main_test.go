package e2e

import (
	"testing"

	"warden/internal/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }
