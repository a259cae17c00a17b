// The FQ4 table as lists: GGML_EXT_FQ4_ROW_<s>(f) is f(T[s][0]), .., f(T[s][15]). Eight shapes, from narrow to wide and
// from even to peaked, learnt on real and Gaussian weights; the others are their mirror images.

#ifndef GGML_EXT_FQ4_TABLE_H
#define GGML_EXT_FQ4_TABLE_H

// clang-format off
#define GGML_EXT_FQ4_ROW_0(f) f(-44), f(-35), f(-28), f(-21), f(-16), f(-10), f(-6), f(-1), f(3), f(8), f(13), f(19), f(25), f(32), f(41), f(53)
#define GGML_EXT_FQ4_ROW_1(f) f(-68), f(-49), f(-38), f(-29), f(-21), f(-14), f(-8), f(-1), f(5), f(11), f(17), f(23), f(31), f(39), f(48), f(60)
#define GGML_EXT_FQ4_ROW_2(f) f(-65), f(-53), f(-43), f(-33), f(-25), f(-17), f(-10), f(-2), f(5), f(12), f(19), f(27), f(35), f(45), f(56), f(72)
#define GGML_EXT_FQ4_ROW_3(f) f(-81), f(-58), f(-47), f(-37), f(-27), f(-18), f(-10), f(-2), f(6), f(14), f(22), f(31), f(41), f(51), f(62), f(77)
#define GGML_EXT_FQ4_ROW_4(f) f(-94), f(-66), f(-51), f(-39), f(-29), f(-19), f(-11), f(-2), f(6), f(14), f(23), f(32), f(42), f(53), f(68), f(85)
#define GGML_EXT_FQ4_ROW_5(f) f(-90), f(-72), f(-57), f(-44), f(-33), f(-23), f(-13), f(-3), f(6), f(15), f(25), f(35), f(47), f(60), f(79), f(99)
#define GGML_EXT_FQ4_ROW_6(f) f(-107), f(-73), f(-57), f(-44), f(-32), f(-21), f(-12), f(-2), f(8), f(18), f(28), f(39), f(51), f(66), f(85), f(111)
#define GGML_EXT_FQ4_ROW_7(f) f(-127), f(-81), f(-60), f(-44), f(-32), f(-20), f(-11), f(-2), f(7), f(16), f(27), f(38), f(52), f(70), f(101), f(127)
#define GGML_EXT_FQ4_ROW_8(f) f(-53), f(-41), f(-32), f(-25), f(-19), f(-13), f(-8), f(-3), f(1), f(6), f(10), f(16), f(21), f(28), f(35), f(44)
#define GGML_EXT_FQ4_ROW_9(f) f(-60), f(-48), f(-39), f(-31), f(-23), f(-17), f(-11), f(-5), f(1), f(8), f(14), f(21), f(29), f(38), f(49), f(68)
#define GGML_EXT_FQ4_ROW_10(f) f(-72), f(-56), f(-45), f(-35), f(-27), f(-19), f(-12), f(-5), f(2), f(10), f(17), f(25), f(33), f(43), f(53), f(65)
#define GGML_EXT_FQ4_ROW_11(f) f(-77), f(-62), f(-51), f(-41), f(-31), f(-22), f(-14), f(-6), f(2), f(10), f(18), f(27), f(37), f(47), f(58), f(81)
#define GGML_EXT_FQ4_ROW_12(f) f(-85), f(-68), f(-53), f(-42), f(-32), f(-23), f(-14), f(-6), f(2), f(11), f(19), f(29), f(39), f(51), f(66), f(94)
#define GGML_EXT_FQ4_ROW_13(f) f(-99), f(-79), f(-60), f(-47), f(-35), f(-25), f(-15), f(-6), f(3), f(13), f(23), f(33), f(44), f(57), f(72), f(90)
#define GGML_EXT_FQ4_ROW_14(f) f(-111), f(-85), f(-66), f(-51), f(-39), f(-28), f(-18), f(-8), f(2), f(12), f(21), f(32), f(44), f(57), f(73), f(107)
#define GGML_EXT_FQ4_ROW_15(f) f(-127), f(-101), f(-70), f(-52), f(-38), f(-27), f(-16), f(-7), f(2), f(11), f(20), f(32), f(44), f(60), f(81), f(127)
// clang-format on

#endif  // GGML_EXT_FQ4_TABLE_H
