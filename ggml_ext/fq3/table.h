// The FQ3 table as lists: GGML_EXT_FQ3_ROW_<s>(f) is f(T[s][0]), .., f(T[s][7]). Eight shapes, from narrow to wide,
// learnt on Gaussian and Student-t weights (scripts/fq4_table.py --codes 8); the others are their mirror images.

#ifndef GGML_EXT_FQ3_TABLE_H
#define GGML_EXT_FQ3_TABLE_H

// clang-format off
#define GGML_EXT_FQ3_ROW_0(f) f(-37), f(-23), f(-11), f(-2), f(6), f(16), f(28), f(44)
#define GGML_EXT_FQ3_ROW_1(f) f(-55), f(-30), f(-15), f(-3), f(9), f(20), f(34), f(49)
#define GGML_EXT_FQ3_ROW_2(f) f(-55), f(-36), f(-19), f(-5), f(9), f(24), f(41), f(65)
#define GGML_EXT_FQ3_ROW_3(f) f(-58), f(-35), f(-17), f(-1), f(15), f(32), f(53), f(81)
#define GGML_EXT_FQ3_ROW_4(f) f(-76), f(-41), f(-21), f(-4), f(11), f(28), f(46), f(71)
#define GGML_EXT_FQ3_ROW_5(f) f(-71), f(-46), f(-26), f(-7), f(11), f(31), f(58), f(98)
#define GGML_EXT_FQ3_ROW_6(f) f(-97), f(-43), f(-20), f(-2), f(16), f(37), f(64), f(99)
#define GGML_EXT_FQ3_ROW_7(f) f(-88), f(-46), f(-23), f(-6), f(10), f(28), f(52), f(127)
#define GGML_EXT_FQ3_ROW_8(f) f(-44), f(-28), f(-16), f(-6), f(2), f(11), f(23), f(37)
#define GGML_EXT_FQ3_ROW_9(f) f(-49), f(-34), f(-20), f(-9), f(3), f(15), f(30), f(55)
#define GGML_EXT_FQ3_ROW_10(f) f(-65), f(-41), f(-24), f(-9), f(5), f(19), f(36), f(55)
#define GGML_EXT_FQ3_ROW_11(f) f(-81), f(-53), f(-32), f(-15), f(1), f(17), f(35), f(58)
#define GGML_EXT_FQ3_ROW_12(f) f(-71), f(-46), f(-28), f(-11), f(4), f(21), f(41), f(76)
#define GGML_EXT_FQ3_ROW_13(f) f(-98), f(-58), f(-31), f(-11), f(7), f(26), f(46), f(71)
#define GGML_EXT_FQ3_ROW_14(f) f(-99), f(-64), f(-37), f(-16), f(2), f(20), f(43), f(97)
#define GGML_EXT_FQ3_ROW_15(f) f(-127), f(-52), f(-28), f(-10), f(6), f(23), f(46), f(88)
// clang-format on

#endif  // GGML_EXT_FQ3_TABLE_H
